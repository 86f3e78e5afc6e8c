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
import math
import os
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy

from faasmoe_contracts.store import LayerEntry, MappedLayer, Store
from faasmoe_contracts.store.digests import block_buffers, page_sum_digest
from faasmoe_contracts.store.referenced_files import REMEDY
from faasmoe_contracts.store.tensors import MappedFile
from faasmoe_expert.errors import BlockCorrupted
from faasmoe_kernels import KernelsUnavailable, MappingGuard
from faasmoe_kernels import load as load_kernels
from faasmoe_kernels.function_layers import FileIdentity, WeightsFile

logger = logging.getLogger(__name__)

MAX_THREADS = 4
VERIFIED_DIR_ENV = "FAASMOE_VERIFIED_DIR"

FileIdentities = tuple[FileIdentity | None, ...]
"""Identities of the files of a layer; None for one that could not be read."""


class OutOfTime(Exception):
    """Not all bytes could be verified in the time that the caller gave."""


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

    def contains(self, identities: FileIdentities, block: int, digest: str) -> bool:
        """Return whether a block was verified since its files last changed."""
        name = _marker_name(identities, block, digest)
        if None in identities:
            return False
        if (
            name not in self._verified
            and self._marker_dir is not None
            and (self._marker_dir / name).exists()
        ):
            self._verified.add(name)
        return name in self._verified

    def add(self, identities: FileIdentities, block: int, digest: str) -> None:
        """Record a verified block, unless the identity of a file of it is not known."""
        if None in identities:
            return
        name = _marker_name(identities, block, digest)
        self._verified.add(name)
        if self._marker_dir is None:
            return
        try:
            self._marker_dir.mkdir(mode=0o700, exist_ok=True)
            (self._marker_dir / name).touch()
        except OSError as error:  # other processes will verify the block again
            logger.warning("cannot write %s: %s", self._marker_dir / name, error.strerror)


def _guard_mapping(mapped: MappedFile) -> MappingGuard | None:
    """Keep a truncation of a mapped file from ending this process, if the kernels are there."""
    try:
        library = load_kernels()
    except KernelsUnavailable:
        return None
    address = numpy.frombuffer(mapped.mapping, dtype=numpy.uint8).ctypes.data
    guard = library.guard_mapping(address, len(mapped.mapping), file_offset=mapped.offset)
    if guard is not None:
        weakref.finalize(mapped.mapping, guard.close)
    return guard


def _marker_name(identities: FileIdentities, block: int, digest: str) -> str:
    return hashlib.sha256(repr((identities, block, digest)).encode()).hexdigest()[:32]


@cache
def process_verified_blocks() -> VerifiedBlocks:
    """Return the record of this process, configured by FAASMOE_VERIFIED_DIR."""
    marker_dir = os.environ.get(VERIFIED_DIR_ENV)
    return VerifiedBlocks(Path(marker_dir) if marker_dir else None)


class WatchedFile:
    """A mapped file with a guard of its mapping, and what its content was when it was verified.

    Attributes:
        path: its path.
        identity: identity of the content that was verified last; None if that could not be read.
    """

    def __init__(self, mapped: MappedFile) -> None:
        self.path = mapped.path
        self.identity: FileIdentity | None = None
        self._seen: FileIdentity | None = None
        self._is_new = True
        self._guard = _guard_mapping(mapped)

    @property
    def is_damaged(self) -> bool:
        """Whether bytes of the mapping could not be read."""
        return self._guard is not None and self._guard.is_damaged

    def look(self) -> bool:
        """Look at the file; return whether the mapped one changed since the last `accept`."""
        self._seen = file_identity(self.path)
        if self._is_new:
            return True
        return self._is_mapped() and self._seen != self.identity

    def accept(self) -> None:
        """Take the content that was seen as the one that is verified now."""
        self.identity, self._is_new = self._seen, False

    def restore(self) -> bool:
        """Map the file again, whose mapping was damaged; return whether that succeeded."""
        assert self._guard is not None
        if not self._is_mapped():
            return False
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

    def _is_mapped(self) -> bool:
        """Return whether the file that was seen is the mapped one, and not another at its path."""
        seen, identity = self._seen, self.identity
        return seen is not None and (identity is None or seen[:2] == identity[:2])


class BlockVerifier:
    """Verifies the mapped bytes of some experts of one layer, at first and after file changes.

    Args:
        store: the store of the layer.
        layer: manifest entry of the layer.
        mapped: the mapped layer.
        experts: indices of the experts in use; the shared parameters are always verified.
        verified_blocks: record of verified blocks; that of the process by default.
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
        self._layer = layer
        self._mapped = mapped
        self._blocks = (*experts, layer.num_experts)
        self._verified_blocks = verified_blocks or process_verified_blocks()
        self._failure = ""
        self._files = tuple(WatchedFile(file) for file in mapped.files)

    @property
    def files(self) -> tuple[WeightsFile, ...]:
        """The files with the identities of their verified content; none if it did not match."""
        if self._failure:
            return ()
        return tuple(
            WeightsFile(str(file.path), file.identity) for file in self._files if file.identity
        )

    def verify_if_changed(self, *, until_s: float = math.inf) -> bool:
        """Verify the block if its files changed since the last call, and map its pages.

        A file that was removed or replaced needs no verification: the mapping keeps the old bytes.

        Args:
            until_s: after which time (monotonic clock) no verification of an expert is begun.

        Returns:
            Whether the block was verified, that is, its bytes may have changed.

        Raises:
            BlockCorrupted: a digest does not match; raised by every call until a file changes.
            OutOfTime: not everything was verified in time. What was is remembered; this verifier
                accepts nothing until a file changes.
        """
        changed = [file for file in self._files if file.look()]
        damaged = [file for file in self._files if file.is_damaged]
        is_changed = bool(changed)
        if damaged and self._failure and not changed:
            pass  # as it was at the last call
        elif lost := [file for file in damaged if not file.restore()]:
            self._failure = f"store: {lost[0].path} was truncated, and then removed or replaced"
        elif changed or damaged:
            is_changed = True
            for file in changed:
                file.accept()
            self._failure = "store: the verification was not finished"  # if it raises
            self._failure = self._find_corruption(is_damaged=bool(damaged), until_s=until_s)
        if self._failure:
            raise BlockCorrupted(self._failure, field="store")
        return is_changed

    def _find_corruption(self, *, is_damaged: bool, until_s: float) -> str:
        identities = tuple(file.identity for file in self._files)
        digests = self._layer.digests
        blocks = [
            block
            for block in self._blocks
            if is_damaged or not self._verified_blocks.contains(identities, block, digests[block])
        ]
        self._prefault(block for block in self._blocks if block not in blocks)
        for block, got in zip(blocks, self._digests(blocks, until_s), strict=True):
            if got != digests[block]:
                return self._describe_corruption(block, got)
            self._verified_blocks.add(identities, block, digests[block])
        return ""

    def _describe_corruption(self, block: int, got: str) -> str:
        layer = self._layer
        is_expert = block < layer.num_experts
        block_name = f"expert {block}" if is_expert else "shared parameters"
        tensors = [
            (name, view.expert_pieces(block) if is_expert else view.pieces)
            for name, view in sorted(self._mapped.tensors.items())
            if view.is_stacked(layer.num_experts) == is_expert
        ]
        files = dict.fromkeys(self._files[p.file].path for _, pieces in tensors for p in pieces)
        text = (
            f"store: layer {layer.index}, {block_name} of {', '.join(map(str, files))}: "
            f"got digest {got}, expected {layer.digests[block]}: "
            "digest mismatch with the prepared store"
        )
        if layer.file:
            return text
        names = ", ".join(name for name, _ in tensors)
        return f"{text}: {names} of {layer.name} changed in the checkpoint; {REMEDY}"

    def _prefault(self, blocks: Iterable[int]) -> None:
        n_experts = self._layer.num_experts
        self._mapped.prefault(n_experts, (block for block in blocks if block < n_experts))

    def _digests(self, blocks: Sequence[int], until_s: float) -> Iterator[str]:
        """Yield the digests of blocks, computed on up to 4 cores; raises OutOfTime.

        Threads run in parallel because neither numpy's sums nor SHA-256 hold the GIL.
        """
        n_threads = min(MAX_THREADS, len(os.sched_getaffinity(0)), len(blocks))
        if n_threads < 2:
            yield from (self._digest(block, until_s) for block in blocks)
            return
        with ThreadPoolExecutor(n_threads) as pool:
            yield from pool.map(lambda block: self._digest(block, until_s), blocks)

    def _digest(self, block: int, until_s: float) -> str:
        if time.monotonic() > until_s:
            raise OutOfTime
        self._prefault([block])  # while another thread sums
        return page_sum_digest(block_buffers(self._mapped, self._layer.num_experts, block))
