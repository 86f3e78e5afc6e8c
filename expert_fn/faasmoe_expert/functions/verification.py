"""Whether a block's bytes are those that were prepared: digests by expert, and files that change.

A digest is SHA-256 over the sums of 4 KiB pages: it finds any flipped bit and any page that is
missing, empty or in another's place, and runs at the speed at which the pages are read, which their
first use would do anyway. It is no defence against an attacker, who could as well change the
manifest.

What was verified is remembered by the file's inode, size and times, in the process and, if a folder
is given, for all processes of the machine: a marker for each block. A file that changes later is
noticed by its times, which costs a system call for each frame.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from faasmoe_contracts.store import LayerEntry, MappedLayer, Store
from faasmoe_expert.errors import BlockCorrupted

logger = logging.getLogger(__name__)

PAGE_WORDS = 512  # of 8 bytes
MAX_THREADS = 4
VERIFIED_DIR_ENV = "FAASMOE_VERIFIED_DIR"

FileIdentity = tuple[int, int, int, int, int]
"""Device, inode, size and times of a file: another one if a byte of it was written."""


def page_sum_digest(parts: Iterable[memoryview]) -> str:
    """Return the digest of bytes that come in parts: 32 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(_page_sums(part))
    return digest.hexdigest()[:32]


def _page_sums(part: memoryview) -> bytes:
    view = part.cast("B")
    n_words = len(view) // 8
    words: NDArray[np.uint64] = np.frombuffer(view, "<u8", n_words)
    n_pages = n_words // PAGE_WORDS
    pages = words[: n_pages * PAGE_WORDS].reshape(n_pages, PAGE_WORDS)
    sums: NDArray[np.uint64] = np.add.reduce(pages, axis=1)
    tail = bytes(view[n_pages * PAGE_WORDS * 8 :])
    return sums.tobytes() + tail


def layer_digests(mapped: MappedLayer, n_experts: int) -> tuple[str, ...]:
    """Return the digests of a layer: one for each expert, then that of what is not stacked."""
    blocks = range(n_experts + 1)
    return tuple(page_sum_digest(block_buffers(mapped, n_experts, block)) for block in blocks)


def block_buffers(mapped: MappedLayer, n_experts: int, block: int) -> Iterator[memoryview]:
    """Give the bytes of one expert; of what is not stacked, if `block` is beyond the experts."""
    for _, view in sorted(mapped.tensors.items()):
        data, is_stacked = view.buffer.cast("B"), view.shape[:1] == (n_experts,)
        if is_stacked and block < n_experts:
            stride = len(data) // n_experts
            yield data[block * stride : (block + 1) * stride]
        elif not is_stacked and block == n_experts:
            yield data


def file_identity(path: Path) -> FileIdentity | None:
    """Return what changes when a file's bytes do; None if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class VerifiedBlocks:
    """What was found right: in this process, and in a folder that processes share."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._verified: set[str] = set()

    def contains(self, identity: FileIdentity, block: int) -> bool:
        """Return whether a block of a file was found right since the file last changed."""
        name = _marker_name(identity, block)
        if (
            name not in self._verified
            and self._folder is not None
            and (self._folder / name).exists()
        ):
            self._verified.add(name)
        return name in self._verified

    def add(self, identity: FileIdentity, block: int) -> None:
        """Take note of a block that was found right."""
        name = _marker_name(identity, block)
        self._verified.add(name)
        if self._folder is None:
            return
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            (self._folder / name).touch()
        except OSError as error:  # it will be verified again; nothing else is lost
            logger.warning("%s cannot be written: %s", self._folder / name, error.strerror)


def _marker_name(identity: FileIdentity, block: int) -> str:
    return hashlib.sha256(repr((identity, block)).encode()).hexdigest()[:32]


@cache
def process_verified_blocks() -> VerifiedBlocks:
    """Return this process's memory."""
    folder = os.environ.get(VERIFIED_DIR_ENV)
    return VerifiedBlocks(Path(folder) if folder else None)


class BlockVerifier:
    """Watches over the mapped bytes of some experts of one layer.

    Args:
        store: where the layer lies.
        layer: its entry in the manifest.
        mapped: its bytes.
        experts: those that are used.
        memory: what is known to be right.
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
        self._path = store.path / layer.file
        self._layer = layer
        self._mapped = mapped
        self._blocks = (*experts, layer.num_experts)
        self._verified_blocks = verified_blocks or process_verified_blocks()
        self._identity: FileIdentity | None = None
        self._failure = ""

    def verify_if_changed(self) -> bool:
        """Return whether the bytes have changed since the last call; raises Corrupted if for bad.

        A file that was removed or replaced is left alone: what is mapped stays as it is.
        """
        identity = file_identity(self._path)
        if identity is not None and identity != self._identity and self._is_mapped(identity):
            self._identity = identity
            self._failure = self._find_corruption(identity)
            is_changed = True
        else:
            is_changed = False
        if self._failure:
            raise BlockCorrupted(self._failure, field="store")
        return is_changed

    def _is_mapped(self, identity: FileIdentity) -> bool:
        return self._identity is None or identity[:2] == self._identity[:2]

    def _find_corruption(self, identity: FileIdentity) -> str:
        blocks = [b for b in self._blocks if not self._verified_blocks.contains(identity, b)]
        for block, got in zip(blocks, self._digests(blocks), strict=True):
            if got != (expected := self._layer.digests[block]):
                is_expert = block < self._layer.num_experts
                what = f"expert {block}" if is_expert else "shared parameters"
                return (
                    f"store: layer {self._layer.index}, {what} of {self._path}: got digest {got}, "
                    f"expected {expected}: digest mismatch with the prepared store"
                )
            self._verified_blocks.add(identity, block)
        return ""

    def _digests(self, blocks: Sequence[int]) -> Iterator[str]:
        """Give the digests of blocks, found on all cores that are allowed.

        Neither sums nor SHA-256 hold the interpreter's lock.
        """
        n_threads = min(MAX_THREADS, len(os.sched_getaffinity(0)), len(blocks))
        if n_threads < 2:
            yield from map(self._digest, blocks)
            return
        with ThreadPoolExecutor(n_threads) as pool:
            yield from pool.map(self._digest, blocks)

    def _digest(self, block: int) -> str:
        return page_sum_digest(block_buffers(self._mapped, self._layer.num_experts, block))
