"""Read-ahead: asks the kernel to load weights into the page cache before they are needed.

So neither a model's start nor an activation waits for the disk. The functions' weights take a share
of the free memory only.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store, StoreError
from faasmoe_contracts.store.tensors import MappedFile, TensorPiece
from faasmoe_operator.control.functions import ManagedFunction
from faasmoe_operator.control.state_files import PopularityFile, popularity_path

logger = logging.getLogger(__name__)

MAX_SHARE_OF_FREE_MEMORY = 0.25


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A range of bytes in a file of the store."""

    path: Path
    offset: int
    length: int


def free_memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Return the memory in bytes that is available without swapping; 0 if it is unknown."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return 0
    fields = (line.split() for line in lines if line.startswith("MemAvailable:"))
    return next((int(words[1]) * 1024 for words in fields), 0)


def max_read_ahead_bytes() -> int:
    """Return how many bytes of functions may be read ahead now."""
    return int(free_memory_bytes() * MAX_SHARE_OF_FREE_MEMORY)


def read_ahead_start(
    store: Store, functions: Collection[ManagedFunction], popularity: Mapping[str, float]
) -> None:
    """Ask the kernel to read what a starting model needs first.

    That is the router's tensors, and then the functions that the last run used, the most popular
    first.

    Args:
        store: the model's store.
        functions: all functions of the model.
        popularity: rows that functions had in the last run, by `ManagedFunction.stable_key`.

    Raises:
        StoreError: the store is damaged.
        OSError: a file of the store cannot be read.
    """
    for part in router_ranges(store):
        _advise_will_need(part)
    used = [function for function in functions if popularity.get(function.stable_key)]
    used.sort(key=lambda function: -popularity[function.stable_key])
    sizes = [(function.spec, function.size_bytes) for function in used]
    read_ahead(store, sizes, max_bytes=max_read_ahead_bytes())


def start_reading_ahead(store: Store, functions: Collection[ManagedFunction]) -> threading.Thread:
    """Call `read_ahead_start` in a thread, with what the last run has left beside the store.

    It ends with the process. What cannot be read is reported by the processes that need it.
    """

    def run() -> None:
        saved = PopularityFile(popularity_path(store.path), model_digest=store.manifest.digest)
        try:
            read_ahead_start(store, functions, saved.read())
        except (StoreError, OSError) as error:
            logger.debug("read-ahead failed: %s", error)

    thread = threading.Thread(target=run, name="read-ahead", daemon=True)
    thread.start()
    return thread


def read_ahead(
    store: Store, functions: Iterable[tuple[FunctionSpec, int]], *, max_bytes: int
) -> int:
    """Ask the kernel to read functions' weights; return the number of functions.

    Args:
        store: the store that holds the weights.
        functions: each function and its size in bytes, the most important first.
        max_bytes: maximum total size of the functions.

    Raises:
        StoreError: the store is damaged.
        OSError: a file of the store cannot be read.
    """
    count = 0
    for spec, size_bytes in functions:
        max_bytes -= size_bytes
        if max_bytes < 0:
            break
        for part in byte_ranges(store, spec):
            _advise_will_need(part)
        count += 1
    return count


def byte_ranges(store: Store, spec: FunctionSpec) -> Iterator[ByteRange]:
    """Yield the ranges of the store's files that hold the weights of a function's experts."""
    for index in spec.layers:
        layer, mapped = store.layer_entry(index), store.map_layer(index)
        for view in mapped.tensors.values():
            pieces = view.pieces
            if view.is_stacked(layer.num_experts):
                pieces = tuple(
                    piece for expert in spec.experts for piece in view.expert_pieces(expert)
                )
            yield from _joined(pieces, mapped.files)


def router_ranges(store: Store) -> Iterator[ByteRange]:
    """Yield the ranges of files that hold the router's tensors, in the store or the checkpoint."""
    for path in store.router_files():
        yield ByteRange(path, 0, path.stat().st_size)
    mapped = store.map_router_references()
    pieces = [piece for view in mapped.tensors.values() for piece in view.pieces]
    pieces.sort(key=lambda piece: (piece.file, piece.offset))
    yield from _joined(pieces, mapped.files)


def _joined(pieces: Sequence[TensorPiece], files: Sequence[MappedFile]) -> Iterator[ByteRange]:
    """Yield the ranges of pieces, those that follow each other as one."""
    start = end = file = -1
    for piece in pieces:
        if (piece.file, piece.offset) != (file, end):
            if end > start:
                yield ByteRange(files[file].path, start, end - start)
            file, start, end = piece.file, piece.offset, piece.offset
        end += piece.buffer.nbytes
    if end > start:
        yield ByteRange(files[file].path, start, end - start)


def _advise_will_need(part: ByteRange) -> None:
    descriptor = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, part.offset, part.length, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
