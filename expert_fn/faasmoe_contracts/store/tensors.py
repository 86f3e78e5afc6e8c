"""Maps tensors: those of a safetensors file, or those that references point to in a checkpoint.

The header of a safetensors file is validated completely: the tensors must cover the data section
without gaps or overlaps. Views point into the mapping, so only the pages that are read become
resident.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import stat
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

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
CHECKPOINT_DTYPE_SIZES: Mapping[str, int] = {**DTYPE_SIZES, "F8_E8M0": 1}
"""The same with dtypes that a checkpoint may have and no store has: powers of two, read as U8."""
MADV_POPULATE_READ = 22  # Linux 5.14; mmap has no constant for it before Python 3.13
_HEADER_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 100_000_000  # same limit as the safetensors library


@dataclass(frozen=True, slots=True)
class TensorPiece:
    """Consecutive bytes of a tensor in a mapped file.

    Attributes:
        buffer: the bytes, in a private mapping: writes never reach the file.
        offset: offset of the first byte in the file.
        file: index of the file in `MappedLayer.files`.
    """

    buffer: memoryview
    offset: int
    file: int = 0

    def part(self, start: int, size_bytes: int) -> TensorPiece:
        """Return `size_bytes` of it from `start` on."""
        return TensorPiece(self.buffer[start : start + size_bytes], self.offset + start, self.file)


@dataclass(frozen=True, slots=True)
class TensorView:
    """One mapped tensor.

    Attributes:
        dtype: safetensors dtype name, a key of DTYPE_SIZES.
        shape: dimensions.
        pieces: its bytes: one piece, or one or several of equal size for each index of dimension 0.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: Sequence[TensorPiece]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPE_SIZES[self.dtype]

    @property
    def is_contiguous(self) -> bool:
        """Whether all bytes follow each other."""
        return len(self.pieces) == 1

    @property
    def buffer(self) -> memoryview:
        """The bytes of a contiguous tensor."""
        (piece,) = self.pieces
        return piece.buffer

    @property
    def offset(self) -> int:
        """Offset in the file of the first byte of a contiguous tensor."""
        (piece,) = self.pieces
        return piece.offset

    def is_stacked(self, n_experts: int) -> bool:
        """Return whether dimension 0 is that of the experts."""
        return self.shape[:1] == (n_experts,)

    def expert_pieces(self, expert: int) -> tuple[TensorPiece, ...]:
        """Return the bytes of one index of dimension 0."""
        n_experts = self.shape[0]
        if self.is_contiguous:
            stride = self.nbytes // n_experts
            return (self.pieces[0].part(expert * stride, stride),)
        count = len(self.pieces) // n_experts
        return tuple(self.pieces[expert * count : (expert + 1) * count])


@dataclass(frozen=True, slots=True)
class MappedFile:
    """A mapped file, or a part of it.

    Attributes:
        path: its path.
        mapping: the memory map.
        offset: offset in the file of the first mapped byte.
    """

    path: Path
    mapping: mmap.mmap
    offset: int = 0

    def piece(self, offset: int, size_bytes: int, *, index: int = 0) -> TensorPiece:
        """Return bytes of the file, which is `MappedLayer.files[index]`."""
        start = offset - self.offset
        return TensorPiece(memoryview(self.mapping)[start : start + size_bytes], offset, index)


class MappedPieces(Sequence[TensorPiece]):
    """Pieces of equal size in mapped files; made when they are read.

    A layer may have thousands, of which a function reads those of its own experts.

    Args:
        places: index of the file and offset in it, of each piece.
        piece_bytes: bytes of each.
        files: the mapped files by the index in `places`, each with its index in
            `MappedLayer.files`.
    """

    def __init__(
        self,
        places: Sequence[tuple[int, int]],
        piece_bytes: int,
        files: Mapping[int, tuple[int, MappedFile]],
    ) -> None:
        self._places = places
        self._piece_bytes = piece_bytes
        self._files = files

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> TensorPiece: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[TensorPiece, ...]: ...
    def __getitem__(self, index: int | slice) -> TensorPiece | tuple[TensorPiece, ...]:
        """Return one piece, or several."""
        if isinstance(index, slice):
            return tuple(map(self._piece, self._places[index]))
        return self._piece(self._places[index])

    def _piece(self, place: tuple[int, int]) -> TensorPiece:
        file, offset = place
        position, mapped = self._files[file]
        return mapped.piece(offset, self._piece_bytes, index=position)


@dataclass(frozen=True, slots=True)
class MappedLayer:
    """The mapped parameters of one experts module.

    Attributes:
        tensors: views by parameter name; each keeps the mapping alive.
        size_bytes: bytes of all tensors.
        files: the files that they lie in.
    """

    tensors: Mapping[str, TensorView]
    size_bytes: int
    files: tuple[MappedFile, ...]

    def prefault(self, n_experts: int, experts: Iterable[int]) -> None:
        """Populate the page tables for some experts, twice as fast as faulting page by page.

        Args:
            n_experts: number of experts in the layer; stacked tensors have this first dimension.
            experts: indices of the experts that will be read.
        """
        for expert in experts:
            for view in self.tensors.values():
                if view.is_stacked(n_experts):
                    for piece in view.expert_pieces(expert):
                        self._prefault_piece(piece)

    def _prefault_piece(self, piece: TensorPiece) -> None:
        file = self.files[piece.file]
        begin = piece.offset - file.offset
        start = begin - begin % mmap.PAGESIZE
        # Only a hint: kernels before 5.14 reject it, and pages are faulted in one by one.
        with contextlib.suppress(OSError):
            file.mapping.madvise(MADV_POPULATE_READ, start, begin + piece.buffer.nbytes - start)


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
    entries, data_start = _read_header(memoryview(mapped), path)
    whole = MappedFile(path, mapped)
    tensors = {
        name: TensorView(e.dtype, e.shape, (whole.piece(data_start + e.start, e.end - e.start),))
        for name, e in entries.items()
    }
    return MappedLayer(tensors, size_bytes - data_start, (whole,))


def map_range(path: Path, *, size_bytes: int, start: int, end: int) -> MappedFile:
    """Map the pages of a file that hold the bytes from `start` to `end`.

    Args:
        path: a regular file; a symbolic link is not followed.
        size_bytes: the size that it must have.
        start: offset of the first byte.
        end: offset behind the last byte.

    Raises:
        StoreError: the file cannot be mapped, or is not regular or not of that size.
    """
    begin = start - start % mmap.ALLOCATIONGRANULARITY
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size != size_bytes:
                raise StoreError(
                    f"{path}: got {status.st_size} bytes, expected a regular file of {size_bytes}"
                )
            mapping = mmap.mmap(
                descriptor,
                end - begin,
                flags=mmap.MAP_PRIVATE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
                offset=begin,
            )
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:  # ValueError: it was truncated in between
        reason = error.strerror if isinstance(error, OSError) else error
        raise StoreError(f"{path}: cannot be mapped: {reason}") from error
    return MappedFile(path, mapping, begin)


def read_tensor_table(
    path: Path,
) -> tuple[dict[str, tuple[str, tuple[int, ...], int]], int]:
    """Read the header of a safetensors file, which may also hold dtypes that no store has.

    Returns:
        The dtype, shape and offset in the file by name of each tensor with a dtype of
        CHECKPOINT_DTYPE_SIZES, and the file's size.

    Raises:
        StoreError: the file cannot be read or is invalid; the message names it and the tensor.
    """
    try:
        with path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            head = file.read(_HEADER_LENGTH.size)
            if len(head) < _HEADER_LENGTH.size:
                raise StoreError(f"{path}: got {len(head)} bytes, expected a safetensors file")
            text = file.read(_header_length(head, size_bytes, path))
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
    data_start = _HEADER_LENGTH.size + len(text)
    table: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for name, value in _load_header(text, path).items():
        dtype = value.get("dtype") if isinstance(value, dict) else None
        if isinstance(dtype, str) and dtype not in CHECKPOINT_DTYPE_SIZES:
            continue
        entry = _read_tensor_info(value, f"{path}: {name}", CHECKPOINT_DTYPE_SIZES)
        if data_start + entry.end > size_bytes:
            raise StoreError(
                f"{path}: {name}: got an end at byte {data_start + entry.end}, expected at most "
                f"{size_bytes}, the file's size"
            )
        table[name] = (entry.dtype, entry.shape, data_start + entry.start)
    return table, size_bytes


def _read_header(data: memoryview, path: Path) -> tuple[dict[str, _TensorInfo], int]:
    """Return tensor infos by name, and the offset of the data section in the file."""
    length = _header_length(data, len(data), path)
    text = bytes(data[_HEADER_LENGTH.size : _HEADER_LENGTH.size + length])
    return _parse_header(text, len(data), path)


def _header_length(data: bytes | memoryview, size_bytes: int, path: Path) -> int:
    (length,) = _HEADER_LENGTH.unpack_from(data)
    if length > _MAX_HEADER_BYTES or _HEADER_LENGTH.size + length > size_bytes:
        raise StoreError(
            f"{path}: header length: got {length}, "
            f"expected at most {size_bytes - _HEADER_LENGTH.size}"
        )
    return int(length)


def _load_header(text: bytes, path: Path) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: header: invalid JSON: {error}") from error
    if not isinstance(header, dict):
        raise StoreError(f"{path}: header: got {type(header).__name__}, expected a JSON object")
    header.pop("__metadata__", None)
    return header


def _parse_header(text: bytes, size_bytes: int, path: Path) -> tuple[dict[str, _TensorInfo], int]:
    header = _load_header(text, path)
    entries = {name: _read_tensor_info(value, f"{path}: {name}") for name, value in header.items()}
    data_start = _HEADER_LENGTH.size + len(text)
    _check_coverage(entries, size_bytes - data_start, path)
    return entries, data_start


def _read_tensor_info(
    value: Any, path: str, dtype_sizes: Mapping[str, int] = DTYPE_SIZES
) -> _TensorInfo:
    fields = JsonFields(value, path)
    dtype, shape, offsets = (
        fields.pop_string("dtype"),
        fields.pop_array("shape"),
        fields.pop_array("data_offsets"),
    )
    fields.reject_unknown()
    if dtype not in dtype_sizes:
        raise fields.error("dtype", dtype, f"one of {', '.join(dtype_sizes)}")
    if not all(_is_count(n) for n in shape):
        raise fields.error("shape", shape, "non-negative integers")
    if len(offsets) != 2 or not all(_is_count(n) for n in offsets):
        raise fields.error("data_offsets", offsets, "two non-negative integers")
    start, end = offsets
    size_bytes = math.prod(shape) * dtype_sizes[dtype]
    if end - start != size_bytes:
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
