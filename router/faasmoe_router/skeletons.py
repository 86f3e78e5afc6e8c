"""Models without weights, by what they are built from, so that routers of equal models build none.

A zygote builds the skeleton of a store's model before it forks a router, which takes it: 0.1 s for
30 layers. A forked router has a copy of its own, so it may change what it takes; the zygote's stays
as it was built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from faasmoe_contracts.store import Store
from faasmoe_router.file_contents import CONTENTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_SKELETONS = 4
CONFIG_NAMES = ("config.json", "generation_config.json")

Key = tuple[str, torch.dtype, tuple[str, ...]]


class SkeletonCache:
    """The skeletons that were used last.

    Args:
        size: how many are kept.
    """

    def __init__(self, *, size: int = MAX_SKELETONS) -> None:
        self._size = size
        self._models: dict[Key, PreTrainedModel] = {}  # the one used last is the last

    def prepare(
        self,
        store: Store,
        dtype: torch.dtype,
        build: Callable[[Store, torch.dtype], PreTrainedModel],
    ) -> None:
        """Build a store's model unless there is one of the same files; raises what `build` does.

        Runs no parallel region, after whose threads a process must not fork.
        """
        key = _key(store, dtype)
        model = self._models.pop(key, None)
        if model is None:
            n_threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                model = build(store, dtype)
            finally:
                torch.set_num_threads(n_threads)
        self._models[key] = model
        while len(self._models) > self._size:
            del self._models[next(iter(self._models))]

    def take(self, store: Store, dtype: torch.dtype) -> PreTrainedModel | None:
        """Remove and return a store's model; None if there is none of its files."""
        return self._models.pop(_key(store, dtype), None) if self._models else None


def _key(store: Store, dtype: torch.dtype) -> Key:
    folder = store.path / "model"
    files = (folder / name for name in CONFIG_NAMES)
    digests = tuple(CONTENTS.digest(path) if path.exists() else "" for path in files)
    return store.manifest.model.architecture, dtype, digests


SKELETONS = SkeletonCache()
"""This process's; routers have what their zygote had."""
