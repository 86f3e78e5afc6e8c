"""The 32-byte header that begins every frame, and the sizes that follow from it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from faasmoe_expert.wire.checksum import Buffer, checksum
from faasmoe_expert.wire.errors import WireError

MAGIC = b"FMOE"
VERSION = 2
FIELDS = struct.Struct("<4sBBBBHHIIII")  # docs/wire.md, "A frame"
CHECKSUM = struct.Struct("<I")  # the last field of the header
FIELDS_BYTES = FIELDS.size
HEADER_BYTES = FIELDS_BYTES + CHECKSUM.size
PAIR_BYTES = 12  # row int32, expert int32, weight float32
MAX_FRAME_BYTES = 8 << 20  # both ways; larger batches are split by rows
MAX_PAIRS_BYTES = 64 << 20  # hidden states gathered pair by pair: bounds a function's memory


class Kind(IntEnum):
    """Which way a frame goes."""

    REQUEST = 1
    RESPONSE = 2


class Dtype(IntEnum):
    """Element type of the rows of a frame."""

    BFLOAT16 = 1
    FLOAT16 = 2
    FLOAT32 = 3

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return 4 if self is Dtype.FLOAT32 else 2


class Mode(IntEnum):
    """What a function returns.

    REDUCED: the sum over a row's pairs, one vector for each row.
    UNREDUCED: each pair's weighted output, one vector for each pair, bit-identical whatever else is
    in the frame.
    """

    REDUCED = 0
    UNREDUCED = 1


@dataclass(frozen=True, slots=True)
class Header:
    """A frame's header, its fields checked.

    Attributes:
        kind: request or response.
        dtype: element type of the rows.
        mode: reduced or unreduced.
        layer: index of the MoE layer, 0-based.
        n_rows: rows T of hidden states in the request, at least 1.
        n_pairs: (row, expert) pairs P, at least 1.
        hidden_size: elements H of a row, at least 1.
    """

    kind: Kind
    dtype: Dtype
    mode: Mode
    layer: int
    n_rows: int
    n_pairs: int
    hidden_size: int

    @property
    def payload_bytes(self) -> int:
        """Bytes that follow the header."""
        row_bytes = self.hidden_size * self.dtype.itemsize
        if self.kind is Kind.REQUEST:
            return self.n_pairs * PAIR_BYTES + self.n_rows * row_bytes
        return row_bytes * (self.n_pairs if self.mode is Mode.UNREDUCED else self.n_rows)

    @property
    def frame_bytes(self) -> int:
        """Bytes of the whole frame."""
        return HEADER_BYTES + self.payload_bytes

    def pack(self) -> bytes:
        """Return the 28 bytes of this header that stand before the checksum."""
        return FIELDS.pack(
            MAGIC, VERSION, self.kind, self.dtype, self.mode, self.layer, 0,
            self.n_rows, self.n_pairs, self.hidden_size, self.payload_bytes,
        )  # fmt: skip


def pack_frame(header: Header, pairs: bytes, rows: Buffer) -> list[Buffer]:
    """Return the buffers of a frame, in order; `rows` is not copied."""
    fields = header.pack()
    return [b"".join((fields, CHECKSUM.pack(checksum(fields + pairs, rows)), pairs)), rows]


def check_frame(frame: memoryview, *, pairs_bytes: int) -> None:
    """Compare a frame's checksum with its bytes; raises WireError."""
    (given,) = CHECKSUM.unpack_from(frame, FIELDS_BYTES)
    start = HEADER_BYTES + pairs_bytes
    before = bytes(frame[:FIELDS_BYTES]) + bytes(frame[HEADER_BYTES:start])
    _check("checksum", given, checksum(before, frame[start:]))


def unpack_header(frame: memoryview, *, kind: Kind) -> Header:
    """Read and check the header of a whole frame; raises WireError that names the field.

    The checksum is not among what is checked; see `check_frame`.
    """
    if len(frame) > MAX_FRAME_BYTES:
        raise WireError("frame", got=f"{len(frame)} bytes", expected=f"at most {MAX_FRAME_BYTES}")
    if len(frame) < HEADER_BYTES:
        raise WireError(
            "frame", got=f"{len(frame)} bytes", expected=f"a {HEADER_BYTES}-byte header"
        )
    magic, version, found, dtype, mode, layer, zero, rows, pairs, hidden, payload = (
        FIELDS.unpack_from(frame)
    )
    _check("magic", magic, MAGIC)
    _check("version", version, VERSION)
    _check("kind", found, int(kind))
    _check("reserved", zero, 0)
    if dtype not in Dtype._value2member_map_:
        raise WireError("dtype", got=dtype, expected="1 (bfloat16), 2 (float16) or 3 (float32)")
    if mode not in Mode._value2member_map_:
        raise WireError("mode", got=mode, expected="0 (reduced) or 1 (unreduced)")
    for field, value in (("n_rows", rows), ("n_pairs", pairs), ("hidden_size", hidden)):
        if value < 1:
            raise WireError(field, got=value, expected="1 or more")
    header = Header(kind, Dtype(dtype), Mode(mode), layer, rows, pairs, hidden)
    _check("payload_bytes", payload, header.payload_bytes)
    _check_pairs_bytes(header)
    _check("frame", f"{len(frame)} bytes", f"{HEADER_BYTES + payload} bytes")
    return header


def rows_per_frame(*, hidden_size: int, dtype: Dtype, mode: Mode, top_k: int) -> int:
    """Return how many rows fit into one frame, request and response, if each has `top_k` pairs."""
    row_bytes = hidden_size * dtype.itemsize
    request_bytes = row_bytes + top_k * PAIR_BYTES
    response_bytes = row_bytes * (top_k if mode is Mode.UNREDUCED else 1)
    rows = (MAX_FRAME_BYTES - HEADER_BYTES) // max(request_bytes, response_bytes)
    rows = min(rows, MAX_PAIRS_BYTES // (row_bytes * max(top_k, 1)))
    if rows < 1:
        raise WireError("hidden_size", got=hidden_size, expected="one row to fit into a frame")
    return rows


def _check_pairs_bytes(header: Header) -> None:
    """Bound what a request makes its function allocate, which may far exceed the frame."""
    row_bytes = header.hidden_size * header.dtype.itemsize
    whole_answer = header.mode is Mode.UNREDUCED
    limit = MAX_FRAME_BYTES - HEADER_BYTES if whole_answer else MAX_PAIRS_BYTES
    if header.n_pairs * row_bytes > limit:
        raise WireError(
            "n_pairs", got=header.n_pairs, expected=f"at most {limit // row_bytes} of this size"
        )


def _check(field: str, got: object, expected: object) -> None:
    if got != expected:
        raise WireError(field, got=got, expected=expected)
