"""Reads weights into the page cache before they are asked for, so that a wake finds them there."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from faasmoe_expert.store import Store
from faasmoe_expert.table import FunctionSpec

MAX_SHARE_OF_FREE_MEMORY = 0.25


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes of a file of the store."""

    path: Path
    offset: int
    length: int


def free_memory_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Return the memory that could be had without swapping; 0 if the system does not tell."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return 0
    found = (line.split() for line in lines if line.startswith("MemAvailable:"))
    return next((int(words[1]) * 1024 for words in found), 0)


def read_ahead(
    store: Store, functions: Iterable[tuple[FunctionSpec, int]], *, max_bytes: int
) -> int:
    """Ask the kernel to read functions' weights; return how many were asked for.

    Args:
        store: where they lie.
        functions: each function and its size, the most important first.
        max_bytes: sizes of the functions taken, all together.
    """
    count = 0
    for spec, size_bytes in functions:
        max_bytes -= size_bytes
        if max_bytes < 0:
            break
        for part in byte_ranges(store, spec):
            _will_need(part)
        count += 1
    return count


def byte_ranges(store: Store, spec: FunctionSpec) -> Iterator[ByteRange]:
    """Give the bytes of the store's files that a function's experts are made of."""
    for index in spec.layers:
        layer = store.layer(index)
        path = store.path / layer.file
        mapped = store.map_layer(index)
        views = [view for view in mapped.tensors.values() if view.buffer.nbytes > 0]
        first = min(_address(view.buffer) for view in views)
        begin = path.stat().st_size - mapped.size_bytes
        for view in views:
            offset = begin + _address(view.buffer) - first
            if view.shape[:1] != (layer.num_experts,):
                yield ByteRange(path, offset, view.buffer.nbytes)
                continue
            stride = view.buffer.nbytes // layer.num_experts
            for low, high in _runs(spec.experts):
                yield ByteRange(path, offset + low * stride, (high - low) * stride)


def _runs(experts: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Give the runs of neighbouring experts: first, and one beyond the last."""
    low = high = experts[0]
    for expert in experts:
        if expert > high:
            yield low, high
            low = expert
        high = expert + 1
    yield low, high


def _address(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _will_need(part: ByteRange) -> None:
    descriptor = os.open(part.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, part.offset, part.length, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
