"""Reads safetensors files through mmap.

The header is validated completely: the tensors must cover the data section without gaps or
overlaps. Views point into the mapping, so only the pages that are read become resident.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faasmoe_contracts.store.json_fields import JsonFields, StoreError

DTYPE_SIZES: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
MADV_POPULATE_READ = 22  # Linux 5.14; mmap has no constant for it before Python 3.13
_HEADER_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000  # same limit as the safetensors library


@dataclass(frozen=True, slots=True)
class TensorView:
    """One tensor of a mapped file.

    Attributes:
        dtype: safetensors dtype name, a key of DTYPE_SIZES.
        shape: dimensions.
        buffer: its bytes, in a private mapping: writes never reach the file.
        offset: offset of the first byte in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    buffer: memoryview
    offset: int


@dataclass(frozen=True, slots=True)
class MappedLayer:
    """The mapped parameters of one experts module.

    Attributes:
        tensors: views by parameter name; each keeps the mapping alive.
        size_bytes: bytes of all tensors.
        mapping: the memory map of the whole file.
    """

    tensors: Mapping[str, TensorView]
    size_bytes: int
    mapping: mmap.mmap

    def prefault(self, n_experts: int, experts: Iterable[int]) -> None:
        """Populate the page tables for some experts, twice as fast as faulting page by page.

        Args:
            n_experts: number of experts in the layer; stacked tensors have this first dimension.
            experts: indices of the experts that will be read.
        """
        for expert in experts:
            for view in self.tensors.values():
                if view.shape[:1] == (n_experts,):
                    stride = view.buffer.nbytes // n_experts
                    self._prefault_range(view.offset + expert * stride, stride)

    def _prefault_range(self, offset: int, size_bytes: int) -> None:
        start = offset - offset % mmap.PAGESIZE
        # Only a hint: kernels before 5.14 reject it, and pages are faulted in one by one.
        with contextlib.suppress(OSError):
            self.mapping.madvise(MADV_POPULATE_READ, start, offset + size_bytes - start)


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def map_tensors(path: Path) -> MappedLayer:
    """Map a safetensors file; raises StoreError naming the file and the tensor."""
    try:
        with path.open("rb") as file:
            size_bytes = path.stat().st_size
            if size_bytes < _HEADER_LENGTH.size:
                raise StoreError(f"{path}: got {size_bytes} bytes, expected a safetensors file")
            mapped = mmap.mmap(
                file.fileno(),
                size_bytes,
                flags=mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
    data = memoryview(mapped)
    entries, data_start = _read_header(data, path)
    tensors = {
        name: TensorView(
            e.dtype, e.shape, data[data_start + e.start : data_start + e.end], data_start + e.start
        )
        for name, e in entries.items()
    }
    return MappedLayer(tensors, size_bytes - data_start, mapped)


def _read_header(data: memoryview, path: Path) -> tuple[dict[str, _TensorInfo], int]:
    """Return tensor infos by name, and the offset of the data section in the file."""
    (length,) = _HEADER_LENGTH.unpack_from(data)
    data_start = _HEADER_LENGTH.size + length
    if length > _MAX_HEADER_BYTES or data_start > len(data):
        raise StoreError(
            f"{path}: header length: got {length}, "
            f"expected at most {len(data) - _HEADER_LENGTH.size}"
        )
    try:
        header = json.loads(bytes(data[_HEADER_LENGTH.size : data_start]))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: header: invalid JSON: {error}") from error
    if not isinstance(header, dict):
        raise StoreError(f"{path}: header: got {type(header).__name__}, expected a JSON object")
    header.pop("__metadata__", None)
    entries = {name: _read_tensor_info(value, f"{path}: {name}") for name, value in header.items()}
    _check_coverage(entries, len(data) - data_start, path)
    return entries, data_start


def _read_tensor_info(value: Any, path: str) -> _TensorInfo:
    fields = JsonFields(value, path)
    dtype, shape, offsets = (
        fields.pop_string("dtype"),
        fields.pop_array("shape"),
        fields.pop_array("data_offsets"),
    )
    fields.reject_unknown()
    if dtype not in DTYPE_SIZES:
        raise fields.error("dtype", dtype, f"one of {', '.join(DTYPE_SIZES)}")
    if not all(_is_count(n) for n in shape):
        raise fields.error("shape", shape, "non-negative integers")
    if len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise fields.error("data_offsets", offsets, "two non-negative integers")
    start, end = offsets
    if end - start != math.prod(shape) * DTYPE_SIZES[dtype]:
        size_bytes = math.prod(shape) * DTYPE_SIZES[dtype]
        raise fields.error("data_offsets", offsets, f"{size_bytes} bytes apart")
    return _TensorInfo(dtype, tuple(shape), start, end)


def _check_coverage(entries: Mapping[str, _TensorInfo], size_bytes: int, path: Path) -> None:
    """Raise StoreError unless tensors cover the data section without gaps or overlaps."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            raise StoreError(
                f"{path}: {name}.data_offsets: got start {entry.start}, expected {end}"
            )
        end = entry.end
    if end != size_bytes:
        raise StoreError(f"{path}: got {size_bytes} bytes of tensors, expected {end}")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
