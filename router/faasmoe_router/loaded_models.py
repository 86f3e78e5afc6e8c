"""Models with the router's tensors, so that routers of models with equal ones load none.

Where all tensors of a router lie in files that its store refers to, as those of variants of a
checkpoint do, a zygote maps, verifies and assigns them before it forks a router, which takes the
model and binds it to its own functions: 30 ms and 9 MB for 30 layers. Files are mapped and guarded
then, so that one that is truncated meanwhile ends no zygote.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from faasmoe_contracts.store import Store, StoreError
from faasmoe_expert.functions.verification import file_identity
from faasmoe_kernels.function_layers import FileIdentity
from faasmoe_router.referenced_tensors import RouterWeightsWatch, digest_of_router
from faasmoe_router.skeletons import Key as SkeletonKey
from faasmoe_router.skeletons import key_of
from faasmoe_transformers.native_step import ComputeMode, one_thread

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_LOADED = 4
MAX_REMEMBERED = 1024  # contents that were asked for once

Key = tuple[SkeletonKey, ComputeMode, str, tuple[FileIdentity | None, ...]]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on the CPU with all tensors but its experts', whose experts are not bound yet.

    Attributes:
        model: the model.
        watch: watches the files that its tensors are mapped from; None if there are none.
    """

    model: PreTrainedModel
    watch: RouterWeightsWatch | None


class LoadedModelCache:
    """The loaded models that were used last.

    Args:
        size: how many are kept.
    """

    def __init__(self, *, size: int = MAX_LOADED) -> None:
        self._size = size
        self._loaded: dict[Key, LoadedModel] = {}  # the one used last is the last
        self._first_users: dict[Key, str] = {}

    def prepare(
        self,
        store: Store,
        dtype: torch.dtype,
        compute: ComputeMode,
        *,
        user: str,
        load: Callable[[], LoadedModel],
    ) -> bool:
        """Load a store's model, once a second user's has equal tensors; raises what `load` does.

        Runs no parallel region, after whose threads a process must not fork.

        Args:
            store: the store.
            dtype: the dtype to compute in.
            compute: what computes the model.
            user: name of the model that a router is to serve.
            load: loads it.

        Returns:
            Whether there is one.
        """
        key = _key(store, dtype, compute)
        if key is None:
            return False
        loaded = self._loaded.pop(key, None)
        if loaded is None or _is_damaged(loaded):
            if self._first_users.setdefault(key, user) == user:
                self._forget_users()
                return False
            with one_thread():
                loaded = load()
        self._loaded[key] = loaded
        while len(self._loaded) > self._size:
            del self._loaded[next(iter(self._loaded))]
        return True

    def take(self, store: Store, dtype: torch.dtype, compute: ComputeMode) -> LoadedModel | None:
        """Remove and return a store's model; None if there is none of its present files."""
        if not self._loaded:
            return None
        try:
            key = _key(store, dtype, compute)
        except StoreError:  # which loading the model will report
            return None
        loaded = None if key is None else self._loaded.pop(key, None)
        return None if loaded is None or _is_damaged(loaded) else loaded

    def _forget_users(self) -> None:
        while len(self._first_users) > MAX_REMEMBERED:
            del self._first_users[next(iter(self._first_users))]


def _is_damaged(loaded: LoadedModel) -> bool:
    return loaded.watch is not None and loaded.watch.is_damaged


def _key(store: Store, dtype: torch.dtype, compute: ComputeMode) -> Key | None:
    """Return what a model is made of; None if the store has tensors of the router itself."""
    if store.router_files():
        return None
    identities = tuple(map(file_identity, store.router_reference_paths()))
    if not identities or None in identities:
        return None
    return key_of(store, dtype), compute, digest_of_router(store), identities


LOADED_MODELS = LoadedModelCache()
"""This process's; routers have what their zygote had."""
