"""Models without weights, by what they are built from, so that routers of equal models build none.

A zygote builds the skeleton of a store's model before it forks a router, which takes it: 0.1 s for
30 layers. A forked router has a copy of its own, so it may change what it takes; the zygote's stays
as it was built.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from faasmoe_contracts.store import Store
from faasmoe_router.file_contents import CONTENTS
from faasmoe_transformers.native_step import one_thread
from faasmoe_transformers.tensor_places import TensorPlaces

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_SKELETONS = 4
CONFIG_NAMES = ("config.json", "generation_config.json")

Key = tuple[str, torch.dtype, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model without weights.

    Attributes:
        model: the model, to be evaluated only.
        places: where its tensors belong.
    """

    model: PreTrainedModel
    places: TensorPlaces


class SkeletonCache:
    """The skeletons that were used last.

    Args:
        size: how many are kept.
    """

    def __init__(self, *, size: int = MAX_SKELETONS) -> None:
        self._size = size
        self._skeletons: dict[Key, Skeleton] = {}  # the one used last is the last

    def prepare(
        self,
        store: Store,
        dtype: torch.dtype,
        build: Callable[[Store, torch.dtype], Skeleton],
    ) -> None:
        """Build a store's model unless there is one of the same files; raises what `build` does.

        Runs no parallel region, after whose threads a process must not fork.
        """
        key = key_of(store, dtype)
        skeleton = self._skeletons.pop(key, None)
        if skeleton is None:
            with one_thread():
                skeleton = build(store, dtype)
        self._skeletons[key] = skeleton
        while len(self._skeletons) > self._size:
            del self._skeletons[next(iter(self._skeletons))]

    def take(self, store: Store, dtype: torch.dtype) -> Skeleton | None:
        """Remove and return a store's model; None if there is none of its files."""
        return self._skeletons.pop(key_of(store, dtype), None) if self._skeletons else None


def key_of(store: Store, dtype: torch.dtype) -> Key:
    """Return what a store's model without weights is built from."""
    folder = store.path / "model"
    files = (folder / name for name in CONFIG_NAMES)
    digests = tuple(CONTENTS.digest(path) if path.exists() else "" for path in files)
    return store.manifest.model.architecture, dtype, digests


SKELETONS = SkeletonCache()
"""This process's; routers have what their zygote had."""
