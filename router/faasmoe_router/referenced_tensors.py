"""The router's tensors that a store refers to in a checkpoint: mapped, verified, and watched.

The tensors are views of the mapped checkpoint, so a file that is written while it is served changes
them. Whoever computes with them calls `RouterWeightsWatch.check` before it uses what was computed.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from faasmoe_contracts.store import MappedLayer, Store
from faasmoe_contracts.store.digests import page_sum_digest
from faasmoe_contracts.store.referenced_files import REMEDY
from faasmoe_expert.functions.verification import (
    VerifiedBlocks,
    WatchedFile,
    process_verified_blocks,
)
from faasmoe_expert.functions.weights import tensor_view
from faasmoe_router.errors import RouterWeightsChanged

MAX_THREADS = 4
WATCH_ATTRIBUTE = "_faasmoe_weights_watch"
ROUTER_BLOCK = -1  # beside the blocks of experts, in the record of what was verified


class RouterWeightsWatch:
    """Watches the files of a checkpoint that a router's tensors are mapped from.

    Args:
        store: the store that refers to them.
        mapped: the mapped tensors.
        verified_blocks: record of what was verified; that of the process by default.
        max_threads: how many threads verify; with 1, none is started.
    """

    def __init__(
        self,
        store: Store,
        mapped: MappedLayer,
        *,
        verified_blocks: VerifiedBlocks | None = None,
        max_threads: int = MAX_THREADS,
    ) -> None:
        assert store.manifest.checkpoint is not None
        self._verified_blocks = verified_blocks or process_verified_blocks()
        self._max_threads = max_threads
        self._digest_of_all = digest_of_router(store)
        self._mapped = mapped
        self._digests = {
            name: entry.digest for name, entry in store.manifest.checkpoint.router.items()
        }
        self._files = [WatchedFile(file) for file in mapped.files]
        self._is_first = True

    @property
    def is_damaged(self) -> bool:
        """Whether bytes of a mapping could not be read."""
        return any(file.is_damaged for file in self._files)

    def check(self) -> None:
        """Verify the tensors if a file changed since the last call, or at first.

        At first that is left out if another router has verified the same files before. A file that
        was removed or replaced has not changed: the mapping keeps the old bytes.

        Raises:
            RouterWeightsChanged: tensors changed; the message names the file and the tensor.
        """
        changed = [file for file in self._files if file.look()]
        damaged = [file for file in self._files if file.is_damaged]
        if damaged:
            raise RouterWeightsChanged(
                f"{damaged[0].path}: was truncated while it was served; {REMEDY}"
            )
        if not changed:
            return
        for file in changed:
            file.accept()
        is_first, self._is_first = self._is_first, False
        record = (tuple(file.identity for file in self._files), ROUTER_BLOCK, self._digest_of_all)
        if is_first and self._verified_blocks.contains(*record):
            return
        self._verify()
        self._verified_blocks.add(*record)

    def _verify(self) -> None:
        n_threads = min(self._max_threads, len(os.sched_getaffinity(0)))
        if n_threads == 1:
            got = {name: self._digest(name) for name in self._digests}
        else:
            with ThreadPoolExecutor(n_threads) as pool:
                got = dict(zip(self._digests, pool.map(self._digest, self._digests), strict=True))
        # A truncated file reads as zeros from where it ends, so its first tensor there differs.
        for name, expected in self._digests.items():
            if got[name] != expected:
                file = self._files[self._mapped.tensors[name].pieces[0].file]
                raise RouterWeightsChanged(
                    f"{file.path}: {name}: got digest {got[name]}, expected {expected}: the "
                    f"checkpoint changed since the store was prepared; {REMEDY}"
                )

    def _digest(self, name: str) -> str:
        return page_sum_digest(piece.buffer for piece in self._mapped.tensors[name].pieces)


def digest_of_router(store: Store) -> str:
    """Return the digest of all tensors of the router that a store refers to."""
    checkpoint = store.manifest.checkpoint
    router = {} if checkpoint is None else checkpoint.router
    digests = sorted((name, entry.digest) for name, entry in router.items())
    return hashlib.sha256(repr(digests).encode()).hexdigest()


def map_referenced_tensors(
    store: Store,
    *,
    verified_blocks: VerifiedBlocks | None = None,
    max_threads: int = MAX_THREADS,
) -> tuple[dict[str, Tensor], RouterWeightsWatch | None]:
    """Map and verify the router's tensors that the store refers to.

    Args:
        store: the store.
        verified_blocks: as for `RouterWeightsWatch`.
        max_threads: the same.

    Returns:
        The tensors by name, and their watch; none and None if the store holds all tensors.

    Raises:
        StoreError: a file is missing or of another size.
        RouterWeightsChanged: a tensor does not match its digest.
    """
    mapped = store.map_router_references()
    if not mapped.tensors:
        return {}, None
    watch = RouterWeightsWatch(
        store, mapped, verified_blocks=verified_blocks, max_threads=max_threads
    )
    watch.check()
    tensors = {
        name: tensor_view(view.buffer, view.dtype, view.shape)
        for name, view in mapped.tensors.items()
    }
    return tensors, watch


def watch_model(model: Any, watch: RouterWeightsWatch | None) -> None:
    """Attach the watch of a model's tensors to the model."""
    setattr(model, WATCH_ATTRIBUTE, watch)


def check_weights(model: Any) -> None:
    """Check the watch of a model's tensors, if there is one; raises RouterWeightsChanged."""
    watch = getattr(model, WATCH_ATTRIBUTE, None)
    if watch is not None:
        watch.check()
