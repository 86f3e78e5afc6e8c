"""The wire format between router and sandboxes: one binary frame each way. See docs/wire.md.

Knows bytes and numpy views of them; knows nothing of torch, HTTP, functions or stores.

What can be wrong with a frame.

The checksum of a frame: finds every flipped bit, at the speed of memory.

TCP's own misses what is changed beyond it: in a proxy, in a buffer, in a host's memory. The CRC-32
of what stands before the rows is added to a sum over the rows, taken as words of 8 bytes: a CRC of
the rows would take as long as the rest of a call.

The 32-byte header that begins every frame, and the sizes that follow from it.

Request frames: rows of hidden states and the experts that each row is for.

Response frames: one vector for each row (reduced) or each pair (unreduced).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "HEADER_BYTES",
    "MAX_FRAME_BYTES",
    "MAX_PAIRS_BYTES",
    "Dtype",
    "ExpertRequest",
    "FrameHeader",
    "FrameKind",
    "OutputMode",
    "WireError",
    "decode_request",
    "decode_response",
    "encode_request",
    "encode_response",
    "max_rows_per_frame",
]


class WireError(ValueError):
    """A frame that breaks the format.

    Attributes:
        field: the part of the frame at fault, as named in docs/wire.md.
    """

    def __init__(self, field: str, *, got: object, expected: object) -> None:
        super().__init__(f"{field}: got {got}, expected {expected}")
        self.field = field


Buffer = bytes | bytearray | memoryview

_WORD = np.dtype("<u8")
_MASK = 0xFFFFFFFF


def frame_checksum(head: Buffer, rows: Buffer) -> int:
    """Return the checksum of a frame, 32 bits.

    Args:
        before: the frame's bytes before the rows, the checksum's own 4 left out.
        rows: the bytes of the rows.
    """
    total = word_sum(rows)
    # Neither half alone sees all bits; a flipped bit changes their sum, carry or not.
    return (zlib.crc32(head) + (total & _MASK) + (total >> 32)) & _MASK


def word_sum(data: Buffer) -> int:
    """Return the sum of little-endian 8-byte words, the last one filled up with zeros, mod 2^64."""
    size_bytes = memoryview(data).nbytes
    n_whole = size_bytes // 8
    words: NDArray[np.uint64] = np.frombuffer(data, _WORD, n_whole)
    total = int(np.add.reduce(words))
    if size_bytes % 8:
        rest = bytes(memoryview(data).cast("B")[8 * n_whole :])
        total += int.from_bytes(rest, "little")
    return total & 0xFFFFFFFFFFFFFFFF


FRAME_MAGIC = b"FMOE"
FRAME_VERSION = 2
HEADER_FIELDS = struct.Struct("<4sBBBBHHIIII")  # docs/wire.md, "A frame"
CHECKSUM_FIELD = struct.Struct("<I")  # the last field of the header
HEADER_FIELDS_BYTES = HEADER_FIELDS.size
HEADER_BYTES = HEADER_FIELDS_BYTES + CHECKSUM_FIELD.size
PAIR_BYTES = 12  # row int32, expert int32, weight float32
MAX_FRAME_BYTES = 8 << 20  # both ways; larger batches are split by rows
MAX_PAIRS_BYTES = 64 << 20  # hidden states gathered pair by pair: bounds a function's memory


class FrameKind(IntEnum):
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


class OutputMode(IntEnum):
    """What a function returns.

    REDUCED: the sum over a row's pairs, one vector for each row.
    UNREDUCED: each pair's weighted output, one vector for each pair, bit-identical whatever else is
    in the frame.
    """

    REDUCED = 0
    UNREDUCED = 1


@dataclass(frozen=True, slots=True)
class FrameHeader:
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

    kind: FrameKind
    dtype: Dtype
    mode: OutputMode
    layer: int
    n_rows: int
    n_pairs: int
    hidden_size: int

    @property
    def payload_bytes(self) -> int:
        """Bytes that follow the header."""
        row_bytes = self.hidden_size * self.dtype.itemsize
        if self.kind is FrameKind.REQUEST:
            return self.n_pairs * PAIR_BYTES + self.n_rows * row_bytes
        return row_bytes * (self.n_pairs if self.mode is OutputMode.UNREDUCED else self.n_rows)

    @property
    def frame_bytes(self) -> int:
        """Bytes of the whole frame."""
        return HEADER_BYTES + self.payload_bytes

    def pack(self) -> bytes:
        """Return the 28 bytes of this header that stand before the checksum."""
        return HEADER_FIELDS.pack(
            FRAME_MAGIC, FRAME_VERSION, self.kind, self.dtype, self.mode, self.layer, 0,
            self.n_rows, self.n_pairs, self.hidden_size, self.payload_bytes,
        )  # fmt: skip


def pack_frame(header: FrameHeader, pairs: bytes, rows: Buffer) -> list[Buffer]:
    """Return the buffers of a frame, in order; `rows` is not copied."""
    fields = header.pack()
    return [
        b"".join((fields, CHECKSUM_FIELD.pack(frame_checksum(fields + pairs, rows)), pairs)),
        rows,
    ]


def verify_checksum(frame: memoryview, *, pairs_bytes: int) -> None:
    """Compare a frame's checksum with its bytes; raises WireError."""
    (stored,) = CHECKSUM_FIELD.unpack_from(frame, HEADER_FIELDS_BYTES)
    start = HEADER_BYTES + pairs_bytes
    head = bytes(frame[:HEADER_FIELDS_BYTES]) + bytes(frame[HEADER_BYTES:start])
    _require_equal("checksum", stored, frame_checksum(head, frame[start:]))


def unpack_header(frame: memoryview, *, kind: FrameKind) -> FrameHeader:
    """Read and check the header of a whole frame; raises WireError that names the field.

    The checksum is not among what is checked; see `check_frame`.
    """
    if len(frame) > MAX_FRAME_BYTES:
        raise WireError("frame", got=f"{len(frame)} bytes", expected=f"at most {MAX_FRAME_BYTES}")
    if len(frame) < HEADER_BYTES:
        raise WireError(
            "frame", got=f"{len(frame)} bytes", expected=f"a {HEADER_BYTES}-byte header"
        )
    magic, version, kind_value, dtype, mode, layer, reserved, rows, pairs, hidden, payload = (
        HEADER_FIELDS.unpack_from(frame)
    )
    _require_equal("magic", magic, FRAME_MAGIC)
    _require_equal("version", version, FRAME_VERSION)
    _require_equal("kind", kind_value, int(kind))
    _require_equal("reserved", reserved, 0)
    if dtype not in Dtype._value2member_map_:
        raise WireError("dtype", got=dtype, expected="1 (bfloat16), 2 (float16) or 3 (float32)")
    if mode not in OutputMode._value2member_map_:
        raise WireError("mode", got=mode, expected="0 (reduced) or 1 (unreduced)")
    for field, value in (("n_rows", rows), ("n_pairs", pairs), ("hidden_size", hidden)):
        if value < 1:
            raise WireError(field, got=value, expected="1 or more")
    header = FrameHeader(kind, Dtype(dtype), OutputMode(mode), layer, rows, pairs, hidden)
    _require_equal("payload_bytes", payload, header.payload_bytes)
    _check_pairs_bytes(header)
    _require_equal("frame", f"{len(frame)} bytes", f"{HEADER_BYTES + payload} bytes")
    return header


def max_rows_per_frame(*, hidden_size: int, dtype: Dtype, mode: OutputMode, top_k: int) -> int:
    """Return how many rows fit into one frame, request and response, if each has `top_k` pairs."""
    row_bytes = hidden_size * dtype.itemsize
    request_bytes = row_bytes + top_k * PAIR_BYTES
    response_bytes = row_bytes * (top_k if mode is OutputMode.UNREDUCED else 1)
    rows = (MAX_FRAME_BYTES - HEADER_BYTES) // max(request_bytes, response_bytes)
    rows = min(rows, MAX_PAIRS_BYTES // (row_bytes * max(top_k, 1)))
    if rows < 1:
        raise WireError("hidden_size", got=hidden_size, expected="one row to fit into a frame")
    return rows


def _check_pairs_bytes(header: FrameHeader) -> None:
    """Bound what a request makes its function allocate, which may far exceed the frame."""
    row_bytes = header.hidden_size * header.dtype.itemsize
    is_unreduced = header.mode is OutputMode.UNREDUCED
    limit = MAX_FRAME_BYTES - HEADER_BYTES if is_unreduced else MAX_PAIRS_BYTES
    if header.n_pairs * row_bytes > limit:
        raise WireError(
            "n_pairs", got=header.n_pairs, expected=f"at most {limit // row_bytes} of this size"
        )


def _require_equal(field: str, got: object, expected: object) -> None:
    if got != expected:
        raise WireError(field, got=got, expected=expected)


Int32s = NDArray[np.int32]
Float32s = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class ExpertRequest:
    """What a function is asked to compute. Arrays are views of the frame, not copies.

    Attributes:
        header: dtype, mode, layer and sizes.
        pair_row: row of each pair, int32 [P], ascending, each in 0..T-1.
        pair_expert: global expert index of each pair, int32 [P], 0 or more.
        pair_weight: routing weight of each pair, float32 [P], finite.
        rows: raw bytes of the hidden states [T, H], of `header.dtype`.
    """

    header: FrameHeader
    pair_row: Int32s
    pair_expert: Int32s
    pair_weight: Float32s
    rows: memoryview


def encode_request(
    rows: Buffer,
    *,
    dtype: Dtype,
    mode: OutputMode,
    layer: int,
    hidden_size: int,
    n_rows: int,
    pair_row: Int32s,
    pair_expert: Int32s,
    pair_weight: Float32s,
) -> list[Buffer]:
    """Return the buffers of one request frame, in order, for a scatter-gather send.

    Args:
        rows: bytes of the hidden states [T, H]; not copied.
        dtype: element type of the rows.
        mode: reduced or unreduced.
        layer: MoE layer index, 0..65535.
        hidden_size: H.
        n_rows: T.
        pair_row: int32 [P], ascending.
        pair_expert: int32 [P].
        pair_weight: float32 [P].
    """
    header = FrameHeader(FrameKind.REQUEST, dtype, mode, layer, n_rows, len(pair_row), hidden_size)
    pairs = b"".join((pair_row.tobytes(), pair_expert.tobytes(), pair_weight.tobytes()))
    return pack_frame(header, pairs, rows)


def decode_request(frame: Buffer) -> ExpertRequest:
    """Read a request frame; raises WireError that names the field.

    The expert indices are checked against the block by the function, which knows it.
    """
    view = memoryview(frame)
    header = unpack_header(view, kind=FrameKind.REQUEST)
    n_pairs, start = header.n_pairs, HEADER_BYTES
    verify_checksum(view, pairs_bytes=PAIR_BYTES * n_pairs)
    pair_row = np.frombuffer(view, np.dtype("<i4"), n_pairs, start)
    pair_expert = np.frombuffer(view, np.dtype("<i4"), n_pairs, start + 4 * n_pairs)
    pair_weight = np.frombuffer(view, np.dtype("<f4"), n_pairs, start + 8 * n_pairs)
    _check_pairs(pair_row, pair_expert, pair_weight, n_rows=header.n_rows)
    return ExpertRequest(
        header, pair_row, pair_expert, pair_weight, view[start + PAIR_BYTES * n_pairs :]
    )


def _check_pairs(row: Int32s, expert: Int32s, weight: Float32s, *, n_rows: int) -> None:
    if row[0] < 0 or row[-1] >= n_rows or (len(row) > 1 and bool((row[1:] < row[:-1]).any())):
        raise WireError(
            "pair_row", got=_preview(row), expected=f"ascending rows in 0..{n_rows - 1}"
        )
    if int(expert.min()) < 0:
        raise WireError("pair_expert", got=_preview(expert), expected="expert indices of 0 or more")
    if not bool(np.isfinite(weight).all()):
        raise WireError("pair_weight", got=_preview(weight), expected="finite weights")


def _preview(values: Int32s | Float32s) -> str:
    values_text = ", ".join(str(v) for v in values[:8])
    return f"[{values_text}{', …' if len(values) > 8 else ''}]"


def encode_response(request: FrameHeader, outputs: Buffer) -> list[Buffer]:
    """Return the buffers of the frame that answers `request`.

    Args:
        request: header of the request.
        outputs: bytes of the outputs, [T, H] reduced or [P, H] unreduced, in the request's dtype.
    """
    header = _response_header(request)
    size_bytes = len(memoryview(outputs).cast("B"))
    if size_bytes != header.payload_bytes:
        raise WireError("outputs", got=f"{size_bytes} bytes", expected=header.payload_bytes)
    return pack_frame(header, b"", outputs)


def decode_response(frame: Buffer, request: FrameHeader) -> memoryview:
    """Return the outputs' bytes in the frame that answers `request`, not copied.

    Raises WireError if the frame is malformed or answers another request.
    """
    view = memoryview(frame)
    expected = _response_header(request)
    if bytes(view[:HEADER_FIELDS_BYTES]) != expected.pack() or len(view) != expected.frame_bytes:
        header = unpack_header(view, kind=FrameKind.RESPONSE)  # which names the field
        raise WireError("header", got=header, expected=expected)
    verify_checksum(view, pairs_bytes=0)
    return view[HEADER_BYTES:]


def _response_header(request: FrameHeader) -> FrameHeader:
    return FrameHeader(
        FrameKind.RESPONSE, request.dtype, request.mode, request.layer,
        request.n_rows, request.n_pairs, request.hidden_size,
    )  # fmt: skip
