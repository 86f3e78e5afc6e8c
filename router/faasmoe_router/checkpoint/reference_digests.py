"""Digests of what a store refers to in a checkpoint, by reading the checkpoint once.

Files are read, not mapped, so that a file that is truncated meanwhile is an error and no signal,
and what was read leaves memory at once. Several threads read and sum at the same time.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from faasmoe_contracts.store import LayerEntry, Store, StoreError
from faasmoe_contracts.store.digests import page_sum_digest
from faasmoe_contracts.store.referenced_files import REMEDY
from faasmoe_contracts.store.references import CheckpointEntry, TensorReference
from faasmoe_expert.functions.weights import TORCH_DTYPES
from faasmoe_router.checkpoint.finite_tensors import is_finite
from faasmoe_router.errors import WeightsNotFinite

CHUNK_BYTES = 4 << 20  # a multiple of the pages that digests are made of
MAX_THREADS = 4


class OnBytesRead(Protocol):
    """Receives the number of bytes of each read; called by several threads, one at a time."""

    def __call__(self, size_bytes: int, /) -> None:
        """Report `size_bytes` more as read."""


Piece = tuple[int, int, int, str]


@dataclass(frozen=True, slots=True)
class Block:
    """What one digest is of.

    Attributes:
        name: what it is, for errors.
        pieces: file, offset, length and dtype of each piece, in the order of the digest.
    """

    name: str
    pieces: tuple[Piece, ...]

    @property
    def key(self) -> str:
        """Identifies the block among those of one checkpoint, by its name and its pieces."""
        return hashlib.sha256(repr((self.name, self.pieces)).encode()).hexdigest()[:32]

    @property
    def size_bytes(self) -> int:
        """Bytes of all pieces."""
        return sum(length for _, _, length, _ in self.pieces)


class DigestRecord(Protocol):
    """Digests of blocks that an interrupted preparation computed, to which others are added."""

    def get(self, key: str, /) -> str | None:
        """Return the digest of a block by its key; None if it is not known."""

    def add(self, key: str, digest: str, /) -> None:
        """Record the digest of a block."""


class NoRecord:
    """A record that keeps nothing."""

    def get(self, _key: str, /) -> str | None:
        """Return None."""
        return None

    def add(self, _key: str, _digest: str, /) -> None:
        """Do nothing."""


def layer_blocks(layer: LayerEntry, references: Mapping[str, TensorReference]) -> Iterator[Block]:
    """Yield the blocks of a layer: each expert, then the shared parameters.

    As `faasmoe_contracts.store.digests.layer_digests` sums them.
    """
    ordered = sorted(references.items())
    stacked = [(n, t) for n, t in ordered if t.shape[:1] == (layer.num_experts,)]
    shared = [t for _, t in ordered if t.shape[:1] != (layer.num_experts,)]
    names = ", ".join(name for name, _ in stacked)
    for expert in range(layer.num_experts):
        pieces = (piece for _, tensor in stacked for piece in _expert_pieces(tensor, expert))
        yield Block(f"{layer.name}: expert {expert} ({names})", tuple(pieces))
    whole = (
        (*piece, tensor.piece_bytes, tensor.dtype) for tensor in shared for piece in tensor.pieces
    )
    yield Block(f"{layer.name}: shared parameters", tuple(whole))


def router_block(name: str, tensor: TensorReference) -> Block:
    """Return the block of one tensor of the router."""
    return Block(name, tuple((*piece, tensor.piece_bytes, tensor.dtype) for piece in tensor.pieces))


def _expert_pieces(tensor: TensorReference, expert: int) -> Iterator[Piece]:
    n_experts, n_pieces = tensor.shape[0], len(tensor.pieces)
    if n_pieces == 1:
        ((file, offset),) = tensor.pieces
        stride = tensor.piece_bytes // n_experts
        yield file, offset + expert * stride, stride, tensor.dtype
        return
    count = n_pieces // n_experts
    for file, offset in tensor.pieces[expert * count : (expert + 1) * count]:
        yield file, offset, tensor.piece_bytes, tensor.dtype


class CheckpointReader:
    """Reads a checkpoint's files and sums blocks; use it as a context manager.

    Args:
        paths: the files, in the order of their indices.
        on_bytes_read: called with the bytes of each read.

    Raises:
        StoreError: a file cannot be opened or is not regular.
    """

    def __init__(self, paths: Sequence[Path], on_bytes_read: OnBytesRead) -> None:
        self._paths = paths
        self._on_bytes_read = on_bytes_read
        self._is_finite = False
        self._local = threading.local()
        self._progress_lock = threading.Lock()
        self._record_lock = threading.Lock()
        self._stack = ExitStack()
        self._descriptors: list[int] = []
        self._states: list[tuple[int, int]] = []
        for path in paths:
            self._open(path)

    def __enter__(self) -> CheckpointReader:
        """Return the reader."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        self._stack.close()

    def digests(
        self,
        blocks: Sequence[Block],
        *,
        is_finite: bool = False,
        record: DigestRecord | None = None,
    ) -> list[str]:
        """Return each block's digest; raises StoreError if a file ends or changes meanwhile.

        Args:
            blocks: the blocks; those that the record knows are not read.
            is_finite: whether weights that are NaN or infinite raise WeightsNotFinite.
            record: receives the digests, each once it is computed.
        """
        record = record or NoRecord()
        self._is_finite = is_finite
        digests = [record.get(block.key) or "" for block in blocks]
        self._on_bytes_read(sum(b.size_bytes for b, d in zip(blocks, digests, strict=True) if d))
        missing = (i for i, digest in enumerate(digests) if not digest)
        order = sorted(missing, key=lambda i: blocks[i].pieces[:1])
        n_threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))

        def compute(index: int) -> str:
            digest = self._digest(blocks[index])
            with self._record_lock:  # at once: what was read is not read again if others fail
                record.add(blocks[index].key, digest)
            return digest

        with ThreadPoolExecutor(n_threads) as pool:
            for i, digest in zip(order, pool.map(compute, order), strict=True):
                digests[i] = digest
        self._check_unchanged()
        return digests

    def _digest(self, block: Block) -> str:
        for file, offset, length, _ in block.pieces:  # read ahead in large parts, while others sum
            os.posix_fadvise(self._descriptors[file], offset, length, os.POSIX_FADV_WILLNEED)
        return page_sum_digest(
            part for piece in block.pieces for part in self._read(block.name, *piece)
        )

    def _read(
        self, name: str, file: int, offset: int, length: int, dtype: str
    ) -> Iterator[memoryview]:
        """Yield the bytes of a piece in chunks, each valid until the next."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = bytearray(CHUNK_BYTES)
        buffer = memoryview(self._local.buffer)
        for start in range(0, length, CHUNK_BYTES):
            part = buffer[: min(CHUNK_BYTES, length - start)]
            done = 0
            while done < len(part):
                count = self._read_at(file, part[done:], offset + start + done)
                if count == 0:
                    raise StoreError(
                        f"{self._paths[file]}: {name}: got {offset + start + done} bytes, expected "
                        f"at least {offset + length}: the file was truncated"
                    )
                done += count
            with self._progress_lock:
                self._on_bytes_read(len(part))
            if self._is_finite and not is_finite(torch.frombuffer(part, dtype=TORCH_DTYPES[dtype])):
                raise WeightsNotFinite(
                    f"{self._paths[file]}: {name}: got values that are NaN or infinite, expected "
                    "finite weights; --allow-nonfinite accepts them"
                )
            yield part

    def _read_at(self, file: int, buffer: memoryview, offset: int) -> int:
        try:
            return os.preadv(self._descriptors[file], [buffer], offset)
        except OSError as error:
            raise StoreError(f"{self._paths[file]}: cannot be read: {error.strerror}") from error

    def _open(self, path: Path) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            self._stack.close()
            raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
        self._stack.callback(os.close, descriptor)
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            self._stack.close()
            raise StoreError(f"{path}: got no regular file, expected one")
        self._descriptors.append(descriptor)
        self._states.append((status.st_size, status.st_mtime_ns))

    def _check_unchanged(self) -> None:
        for path, descriptor, state in zip(
            self._paths, self._descriptors, self._states, strict=True
        ):
            status = os.fstat(descriptor)
            if (got := (status.st_size, status.st_mtime_ns)) != state:
                raise StoreError(
                    f"{path}: got size and mtime_ns {got}, expected {state}: the file changed "
                    "while it was read"
                )


def verify_references(store: Store, on_bytes_read: Callable[[int], None] = lambda _: None) -> None:
    """Read all that a store refers to, and compare it with the manifest's digests.

    Raises:
        StoreError: something is missing or changed; the message names the file and the tensor.
    """
    checkpoint = store.manifest.checkpoint
    if checkpoint is None or not checkpoint.files:
        return
    expected: list[tuple[Block, str]] = []
    for index, references in checkpoint.layers.items():
        layer = store.layer_entry(index)
        expected += zip(layer_blocks(layer, references), layer.digests, strict=True)
    for name, entry in checkpoint.router.items():
        expected.append((router_block(name, entry.tensor), entry.digest))
    paths = [checkpoint.check_file(store.path, i) for i in range(len(checkpoint.files))]
    with CheckpointReader(paths, on_bytes_read) as reader:
        got = reader.digests([block for block, _ in expected])
    for (block, digest), actual in zip(expected, got, strict=True):
        if actual != digest:
            raise StoreError(
                f"{_paths_of(block, checkpoint, store.path)}: {block.name}: got digest {actual}, "
                f"expected {digest}: the checkpoint changed; {REMEDY}"
            )


def _paths_of(block: Block, checkpoint: CheckpointEntry, store: Path) -> str:
    files = dict.fromkeys(file for file, *_ in block.pieces)
    return ", ".join(str(checkpoint.path_of(store, file)) for file in files)
