"""Reads the header of a GGUF file: its metadata, and where each tensor lies.

Nothing in the file is trusted. A length or count is compared with the bytes that are left before
anything is read or allocated, and the header as a whole is limited, so that memory and time are
bounded whatever it says. Knows neither models nor how blocks are decoded.

The format, little-endian: magic, version, number of tensors and of keys; keys with typed values;
names, dimensions, types and offsets of the tensors; padding; the tensors' bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from faasmoe_contracts.text import short_repr
from faasmoe_router.checkpoint.gguf.ggml_types import GGML_TYPES, GgmlType
from faasmoe_router.errors import SourceDamaged

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # version 1 had 32-bit counts and was replaced within weeks
MAX_HEADER_BYTES = 64 << 20
"""Ten times the header of a model with 262,144 tokens."""
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 17
MAX_ARRAY_ITEMS = 1 << 22
MAX_NAME_BYTES = 1 << 10
MAX_STRING_BYTES = 8 << 20
MAX_SHOWN_CHARS = 80
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"

Value = bool | int | float | str | list[str] | NDArray[np.generic]
"""Of a key: a scalar, a string, or an array of either."""

_STRING, _ARRAY = 8, 9
_SCALARS: Mapping[int, np.dtype[np.generic]] = {
    number: np.dtype(name)
    for number, name in {
        **{0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"},
        **{10: "<u8", 11: "<i8", 12: "<f8"},
    }.items()
}
_COUNT = struct.Struct("<Q")
_TYPE = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        name: its name.
        type: how its values are stored.
        shape: dimensions, the slowest first, as in torch.
        offset: of its first byte in the file.
        size_bytes: its bytes.
    """

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """The header of one file.

    Attributes:
        metadata: the values by key.
        tensors: the tensors by name, in the file's order.
    """

    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]


def read_header(file: BinaryIO, *, name: str, size_bytes: int) -> Header:
    """Read the header at the beginning of a file.

    Args:
        file: the file, at its beginning.
        name: its name, for messages.
        size_bytes: size of the whole file.

    Raises:
        SourceDamaged: the header is no valid one, or contradicts the file's size; the message
            names the file, the key or tensor, what was got and what was expected.
    """
    source = _Input(file, name, size_bytes)
    n_tensors, n_keys = _read_counts(source)
    metadata: dict[str, Value] = {}
    for index in range(n_keys):
        key = source.string(f"name of key {index}", MAX_NAME_BYTES)
        if key in metadata:
            raise source.error(key, "the key twice", "each key once")
        metadata[key] = _read_value(source, key)
    alignment = _alignment(source, metadata)
    infos = [_read_tensor_info(source, index, alignment) for index in range(n_tensors)]
    data_start = -(-source.position // alignment) * alignment
    return Header(metadata, _place(source, infos, data_start))


class _Input:
    """The unread rest of a header; every read is checked against it."""

    def __init__(self, file: BinaryIO, name: str, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.position = 0
        self._file = file
        self._name = name
        self._end = min(size_bytes, MAX_HEADER_BYTES)

    @property
    def remaining_bytes(self) -> int:
        return self._end - self.position

    def error(self, what: str, got: object, expected: object) -> SourceDamaged:
        """Return an error that names the file and a key or tensor."""
        is_plain = what.isprintable() and 0 < len(what) <= MAX_SHOWN_CHARS
        shown = what if is_plain else short_repr(what)
        return SourceDamaged(f"{self._name}: {shown}: got {got}, expected {expected}")

    def take(self, n_bytes: int, what: str) -> bytes:
        if n_bytes > self.remaining_bytes:
            raise self._too_long(f"{n_bytes} bytes", what, self.remaining_bytes)
        data = self._file.read(n_bytes)
        self.position += n_bytes
        if len(data) != n_bytes:
            raise self.error(what, f"{len(data)} bytes", f"{n_bytes}: the file was truncated")
        return data

    def integer(self, layout: struct.Struct, what: str) -> int:
        return int(layout.unpack(self.take(layout.size, what))[0])

    def count(self, what: str, *, item_bytes: int, limit: int) -> int:
        """Read a count of items that follow, of at least `item_bytes` each."""
        count = self.integer(_COUNT, what)
        if count * item_bytes > self.remaining_bytes:
            at_most = self.remaining_bytes // item_bytes
            raise self._too_long(f"{count} items", what, min(limit, at_most))
        if count > limit:
            raise self.error(what, f"{count} items", f"at most {limit}")
        return count

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        data = self.take(self.count(what, item_bytes=1, limit=limit), what)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.error(what, f"bytes that are not UTF-8: {error.reason}", "UTF-8") from error

    def _too_long(self, got: str, what: str, at_most: int) -> SourceDamaged:
        where = "the file" if self._end == self.size_bytes else f"{MAX_HEADER_BYTES} bytes"
        return self.error(what, got, f"at most {at_most}: a header that ends within {where}")


def _read_counts(source: _Input) -> tuple[int, int]:
    """Return the numbers of tensors and of keys."""
    magic = source.take(len(MAGIC), "magic")
    if magic != MAGIC:
        raise source.error("magic", repr(magic), f"{MAGIC!r}: a GGUF file")
    version = source.integer(_TYPE, "version")
    if version not in VERSIONS:
        hint = " (big-endian files are not read)" if version >> 16 else ""
        raise source.error("version", f"{version}{hint}", " or ".join(map(str, VERSIONS)))
    n_tensors = source.count("number of tensors", item_bytes=0, limit=MAX_TENSORS)
    n_keys = source.count("number of keys", item_bytes=13, limit=MAX_KEYS)
    return n_tensors, n_keys


def _read_value(source: _Input, key: str) -> Value:
    kind = source.integer(_TYPE, key)
    if kind == _STRING:
        return source.string(key)
    if kind == _ARRAY:
        return _read_array(source, key)
    scalar = _scalar_type(source, key, kind)
    value = np.frombuffer(source.take(scalar.itemsize, key), scalar)[0].item()
    assert isinstance(value, bool | int | float)
    return value


def _read_array(source: _Input, key: str) -> list[str] | NDArray[np.generic]:
    kind = source.integer(_TYPE, key)
    if kind == _ARRAY:
        raise source.error(key, "an array of arrays", "an array of strings or numbers")
    if kind == _STRING:
        count = source.count(key, item_bytes=_COUNT.size, limit=MAX_ARRAY_ITEMS)
        return [source.string(f"{key}[{index}]") for index in range(count)]
    scalar = _scalar_type(source, key, kind)
    count = source.count(key, item_bytes=scalar.itemsize, limit=MAX_ARRAY_ITEMS)
    return np.frombuffer(source.take(count * scalar.itemsize, key), scalar)


def _scalar_type(source: _Input, key: str, kind: int) -> np.dtype[np.generic]:
    scalar = _SCALARS.get(kind)
    if scalar is None:
        raise source.error(key, f"value type {kind}", "a type from 0 to 12")
    return scalar


def _alignment(source: _Input, metadata: Mapping[str, Value]) -> int:
    value = metadata.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
    is_valid = type(value) is int and 0 < value <= MAX_ALIGNMENT and value & (value - 1) == 0
    if not is_valid or not isinstance(value, int):
        expected = f"a power of two up to {MAX_ALIGNMENT}"
        raise source.error(ALIGNMENT_KEY, short_repr(value), expected)
    return value


def _read_tensor_info(source: _Input, index: int, alignment: int) -> TensorInfo:
    """Read one entry; its offset is relative to the data section."""
    name = source.string(f"name of tensor {index}", MAX_NAME_BYTES)
    n_dimensions = source.integer(_TYPE, name)
    if not 1 <= n_dimensions <= MAX_DIMENSIONS:
        raise source.error(name, f"{n_dimensions} dimensions", f"1 to {MAX_DIMENSIONS}")
    sizes = struct.unpack(f"<{n_dimensions}Q", source.take(8 * n_dimensions, name))
    if 0 in sizes:
        raise source.error(name, f"shape {list(sizes)}", "positive dimensions")
    number = source.integer(_TYPE, name)
    kind = GGML_TYPES.get(number)
    if kind is None:
        raise source.error(name, f"type {number}", f"one of {_type_names()}")
    if sizes[0] % kind.block_elements:
        expected = f"a multiple of {kind.block_elements}, the block of {kind.name}"
        raise source.error(name, f"{sizes[0]} columns", expected)
    offset = source.integer(_COUNT, name)
    if offset % alignment:
        raise source.error(name, f"offset {offset}", f"a multiple of {alignment}")
    size_bytes = math.prod(sizes) // kind.block_elements * kind.block_bytes
    return TensorInfo(name, kind, tuple(reversed(sizes)), offset, size_bytes)


def _type_names() -> str:
    return ", ".join(f"{kind.name} ({number})" for number, kind in GGML_TYPES.items())


def _place(source: _Input, infos: list[TensorInfo], data_start: int) -> dict[str, TensorInfo]:
    """Return the tensors with offsets in the file; they must neither overlap nor leave it."""
    end, previous = data_start, ""
    for info in sorted(infos, key=lambda info: info.offset):
        start = data_start + info.offset
        if start < end:
            expected = f"at least {end - data_start}, the end of {short_repr(previous)}"
            raise source.error(info.name, f"offset {info.offset}", expected)
        end, previous = start + info.size_bytes, info.name
        if end > source.size_bytes:
            got = f"{info.size_bytes} bytes from {start} on"
            expected = f"an end within the file's {source.size_bytes} bytes"
            raise source.error(info.name, got, f"{expected}: it is truncated, or its header wrong")
    placed: dict[str, TensorInfo] = {}
    for info in infos:
        if info.name in placed:
            raise source.error(info.name, "the tensor twice", "each tensor once")
        offset = data_start + info.offset
        placed[info.name] = TensorInfo(info.name, info.type, info.shape, offset, info.size_bytes)
    return placed
