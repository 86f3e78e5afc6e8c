"""Verifies mapped expert blocks against the digests in the store's manifest.

A verified block is remembered under the file's device, inode, size and times: in the process and,
if FAASMOE_VERIFIED_DIR is set, as a marker file for all processes of the machine. Later changes of
the file are detected by its times, which costs one stat call per frame. A file that is truncated
would end the process (SIGBUS): the kernel library makes zeros of what cannot be read, and the block
counts as changed. For what digests detect see `faasmoe_contracts.store.digests`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy

from faasmoe_contracts.store import LayerEntry, MappedLayer, Store
from faasmoe_contracts.store.digests import block_buffers, page_sum_digest
from faasmoe_expert.errors import BlockCorrupted
from faasmoe_kernels import KernelsUnavailable, MappingGuard
from faasmoe_kernels import load as load_kernels

logger = logging.getLogger(__name__)

MAX_THREADS = 4
VERIFIED_DIR_ENV = "FAASMOE_VERIFIED_DIR"

FileIdentity = tuple[int, int, int, int, int]
"""Device, inode, size, mtime_ns and ctime_ns of a file; changes whenever the file is written."""


def file_identity(path: Path) -> FileIdentity | None:
    """Return the identity of a file's current content; None if the file is inaccessible."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class VerifiedBlocks:
    """Blocks whose digests matched, in memory and as marker files shared by processes.

    Args:
        marker_dir: directory of the marker files; None to keep the record in memory only.
    """

    def __init__(self, marker_dir: Path | None) -> None:
        self._marker_dir = marker_dir
        self._verified: set[str] = set()

    def contains(self, identity: FileIdentity, block: int) -> bool:
        """Return whether a block was verified since the file last changed."""
        name = _marker_name(identity, block)
        if (
            name not in self._verified
            and self._marker_dir is not None
            and (self._marker_dir / name).exists()
        ):
            self._verified.add(name)
        return name in self._verified

    def add(self, identity: FileIdentity, block: int) -> None:
        """Record a verified block."""
        name = _marker_name(identity, block)
        self._verified.add(name)
        if self._marker_dir is None:
            return
        try:
            self._marker_dir.mkdir(mode=0o700, exist_ok=True)
            (self._marker_dir / name).touch()
        except OSError as error:  # other processes will verify the block again
            logger.warning("cannot write %s: %s", self._marker_dir / name, error.strerror)


def _guard_mapping(mapped: MappedLayer) -> MappingGuard | None:
    """Keep a truncation of a mapped file from ending this process, if the kernels are there."""
    try:
        library = load_kernels()
    except KernelsUnavailable:
        return None
    address = numpy.frombuffer(mapped.mapping, dtype=numpy.uint8).ctypes.data
    guard = library.guard_mapping(address, len(mapped.mapping))
    if guard is not None:
        weakref.finalize(mapped.mapping, guard.close)
    return guard


def _marker_name(identity: FileIdentity, block: int) -> str:
    return hashlib.sha256(repr((identity, block)).encode()).hexdigest()[:32]


@cache
def process_verified_blocks() -> VerifiedBlocks:
    """Return the record of this process, configured by FAASMOE_VERIFIED_DIR."""
    marker_dir = os.environ.get(VERIFIED_DIR_ENV)
    return VerifiedBlocks(Path(marker_dir) if marker_dir else None)


class BlockVerifier:
    """Verifies the mapped bytes of some experts of one layer, at first and after file changes.

    Args:
        store: the store of the layer.
        layer: manifest entry of the layer.
        mapped: the mapped layer.
        experts: indices of the experts in use; the shared parameters are always verified.
        verified_blocks: record of verified blocks; that of the process by default.

    Attributes:
        path: the layer's file.
    """

    def __init__(
        self,
        store: Store,
        layer: LayerEntry,
        mapped: MappedLayer,
        experts: Sequence[int],
        *,
        verified_blocks: VerifiedBlocks | None = None,
    ) -> None:
        self.path = store.path / layer.file
        self._layer = layer
        self._mapped = mapped
        self._blocks = (*experts, layer.num_experts)
        self._verified_blocks = verified_blocks or process_verified_blocks()
        self._identity: FileIdentity | None = None
        self._failure = ""
        self._guard = _guard_mapping(mapped)

    @property
    def identity(self) -> FileIdentity | None:
        """Identity of the file's content that was verified last; None if it did not match."""
        return None if self._failure else self._identity

    def verify_if_changed(self) -> bool:
        """Verify the block if its file changed since the last call, and map its pages.

        A file that was removed or replaced needs no verification: the mapping keeps the old bytes.

        Returns:
            Whether the block was verified, that is, its bytes may have changed.

        Raises:
            BlockCorrupted: a digest does not match; raised by every call until the file changes.
        """
        identity = file_identity(self.path)
        is_damaged = self._guard is not None and self._guard.is_damaged
        is_same_file = identity is not None and self._is_mapped(identity)
        is_changed = is_same_file and identity != self._identity
        if is_damaged and self._failure and not is_changed:
            pass  # as it was at the last call
        elif is_damaged and not (is_same_file and self._restore()):
            self._failure = f"store: {self.path} was truncated, and then removed or replaced"
        elif identity is not None and (is_damaged or is_changed):
            is_changed = True
            self._identity = identity
            self._failure = self._find_corruption(identity, is_damaged=is_damaged)
        if self._failure:
            raise BlockCorrupted(self._failure, field="store")
        return is_changed

    def _is_mapped(self, identity: FileIdentity) -> bool:
        return self._identity is None or identity[:2] == self._identity[:2]

    def _restore(self) -> bool:
        """Map the file again, whose mapping was damaged; return whether that succeeded."""
        assert self._guard is not None
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            self._guard.restore(descriptor)
        except OSError as error:
            logger.warning("cannot map %s again: %s", self.path, error.strerror)
            return False
        finally:
            os.close(descriptor)
        return True

    def _find_corruption(self, identity: FileIdentity, *, is_damaged: bool) -> str:
        blocks = [
            block
            for block in self._blocks
            if is_damaged or not self._verified_blocks.contains(identity, block)
        ]
        self._prefault(block for block in self._blocks if block not in blocks)
        for block, got in zip(blocks, self._digests(blocks), strict=True):
            if got != (expected := self._layer.digests[block]):
                is_expert = block < self._layer.num_experts
                block_name = f"expert {block}" if is_expert else "shared parameters"
                return (
                    f"store: layer {self._layer.index}, {block_name} of {self.path}: "
                    f"got digest {got}, expected {expected}: "
                    "digest mismatch with the prepared store"
                )
            self._verified_blocks.add(identity, block)
        return ""

    def _prefault(self, blocks: Iterable[int]) -> None:
        n_experts = self._layer.num_experts
        self._mapped.prefault(n_experts, (block for block in blocks if block < n_experts))

    def _digests(self, blocks: Sequence[int]) -> Iterator[str]:
        """Yield the digests of blocks, computed on up to 4 cores.

        Threads run in parallel because neither numpy's sums nor SHA-256 hold the GIL.
        """
        n_threads = min(MAX_THREADS, len(os.sched_getaffinity(0)), len(blocks))
        if n_threads < 2:
            yield from map(self._digest, blocks)
            return
        with ThreadPoolExecutor(n_threads) as pool:
            yield from pool.map(self._digest, blocks)

    def _digest(self, block: int) -> str:
        self._prefault([block])  # while another thread sums
        return page_sum_digest(block_buffers(self._mapped, self._layer.num_experts, block))
