"""The wire format between router and sandboxes: one binary frame each way. See docs/wire.md.

A frame is a 32-byte header followed by its payload. A request carries rows of hidden states and the
(row, expert) pairs to compute; a response carries one vector per row (reduced) or per pair
(unreduced). Decoding validates every field and returns views of the input, not copies. Works on
bytes and numpy views; knows nothing of torch, HTTP, functions or stores.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

FRAME_MAGIC = b"FMOE"
FRAME_VERSION = 3
HEADER_FIELDS = struct.Struct("<4sBBBBHHIIII")  # docs/wire.md, "A frame"
CHECKSUM_FIELD = struct.Struct("<I")  # the last field of the header
HEADER_FIELDS_BYTES = HEADER_FIELDS.size
HEADER_BYTES = HEADER_FIELDS_BYTES + CHECKSUM_FIELD.size
PAIR_BYTES = 12  # row int32, expert int32, weight float32
MAX_FRAME_BYTES = 8 << 20  # in both directions; larger batches are split by rows
MAX_PAIRS_BYTES = 64 << 20  # of hidden states gathered per pair; bounds a function's memory
_WORD = np.dtype("<u8")
_MASK = 0xFFFFFFFF

Buffer = bytes | bytearray | memoryview
Int32s = NDArray[np.int32]
Float32s = NDArray[np.float32]


class WireError(ValueError):
    """Raised for a frame that violates the wire format.

    Attributes:
        field: name of the invalid field, as in docs/wire.md.
    """

    def __init__(self, field: str, *, got: object, expected: object) -> None:
        super().__init__(f"{field}: got {got}, expected {expected}")
        self.field = field


class FrameKind(IntEnum):
    """Direction of a frame."""

    REQUEST = 1
    RESPONSE = 2


class Dtype(IntEnum):
    """Element type of a frame's rows."""

    BFLOAT16 = 1
    FLOAT16 = 2
    FLOAT32 = 3

    @property
    def itemsize(self) -> int:
        """Size of one element in bytes."""
        return 4 if self is Dtype.FLOAT32 else 2


class OutputMode(IntEnum):
    """Shape of a function's output.

    REDUCED: the weighted sum over each row's pairs, one vector per row, in float32 whatever the
    dtype of the rows.
    UNREDUCED: the weighted output of each pair, one vector per pair, bit-identical regardless of
    the rest of the frame.
    """

    REDUCED = 0
    UNREDUCED = 1


_DTYPES, _MODES = frozenset(Dtype), frozenset(OutputMode)


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """A validated frame header.

    Attributes:
        kind: request or response.
        dtype: element type of the rows of a request, or of the outputs of a response.
        mode: reduced or unreduced.
        layer: MoE layer index, 0-based.
        n_rows: number of rows T of hidden states in the request, at least 1.
        n_pairs: number of (row, expert) pairs P, at least 1.
        hidden_size: number of elements H per row, at least 1.
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
        """Number of bytes after the header."""
        row_bytes = self.hidden_size * self.dtype.itemsize
        if self.kind is FrameKind.REQUEST:
            return self.n_pairs * PAIR_BYTES + self.n_rows * row_bytes
        return row_bytes * (self.n_pairs if self.mode is OutputMode.UNREDUCED else self.n_rows)

    @property
    def frame_bytes(self) -> int:
        """Size of the whole frame in bytes."""
        return HEADER_BYTES + self.payload_bytes

    def pack(self) -> bytes:
        """Return the 28 header bytes that precede the checksum."""
        return HEADER_FIELDS.pack(
            FRAME_MAGIC, FRAME_VERSION, self.kind, self.dtype, self.mode, self.layer, 0,
            self.n_rows, self.n_pairs, self.hidden_size, self.payload_bytes,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExpertRequest:
    """A decoded request frame; its arrays are views of the frame, not copies.

    Attributes:
        header: dtype, mode, layer and sizes.
        pair_row: row of each pair, int32 [P], ascending, in 0..T-1.
        pair_expert: global expert index of each pair, int32 [P], non-negative.
        pair_weight: routing weight of each pair, float32 [P], finite.
        rows: raw bytes of the hidden states [T, H] in `header.dtype`.
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
    """Return the buffers of one request frame in order, for a scatter-gather write.

    Args:
        rows: bytes of the hidden states [T, H], not copied.
        dtype: element type of the rows.
        mode: reduced or unreduced.
        layer: MoE layer index, 0..65535.
        hidden_size: H, elements per row.
        n_rows: T, number of rows.
        pair_row: int32 [P], ascending.
        pair_expert: int32 [P].
        pair_weight: float32 [P].
    """
    header = FrameHeader(FrameKind.REQUEST, dtype, mode, layer, n_rows, len(pair_row), hidden_size)
    pairs = b"".join((pair_row.tobytes(), pair_expert.tobytes(), pair_weight.tobytes()))
    return _pack_frame(header, pairs, rows)


def decode_request(frame: Buffer) -> ExpertRequest:
    """Decode and validate a request frame.

    Expert indices are only checked to be non-negative; the function checks them against its block.

    Raises:
        WireError: a field is invalid.
    """
    view = memoryview(frame)
    header = _unpack_header(view, kind=FrameKind.REQUEST)
    n_pairs, start = header.n_pairs, HEADER_BYTES
    _verify_checksum(view, pairs_bytes=PAIR_BYTES * n_pairs)
    pair_row = np.frombuffer(view, np.dtype("<i4"), n_pairs, start)
    pair_expert = np.frombuffer(view, np.dtype("<i4"), n_pairs, start + 4 * n_pairs)
    pair_weight = np.frombuffer(view, np.dtype("<f4"), n_pairs, start + 8 * n_pairs)
    _check_pairs(pair_row, pair_expert, pair_weight, n_rows=header.n_rows)
    return ExpertRequest(
        header, pair_row, pair_expert, pair_weight, view[start + PAIR_BYTES * n_pairs :]
    )


def encode_response(request: FrameHeader, outputs: Buffer) -> list[Buffer]:
    """Return the buffers of the response frame to `request`, in order.

    Args:
        request: header of the request.
        outputs: bytes of the outputs: float32 [T, H] reduced, or [P, H] in the request's dtype.

    Raises:
        WireError: `outputs` has another size.
    """
    header = _response_header(request)
    size_bytes = len(memoryview(outputs).cast("B"))
    if size_bytes != header.payload_bytes:
        raise WireError("outputs", got=f"{size_bytes} bytes", expected=header.payload_bytes)
    return _pack_frame(header, b"", outputs)


def decode_response(frame: Buffer, request: FrameHeader) -> memoryview:
    """Return a view of the outputs in the response frame to `request`.

    Raises:
        WireError: the frame is malformed or answers another request.
    """
    view = memoryview(frame)
    expected = _response_header(request)
    if bytes(view[:HEADER_FIELDS_BYTES]) != expected.pack() or len(view) != expected.frame_bytes:
        header = _unpack_header(view, kind=FrameKind.RESPONSE)  # raises and names the field
        raise WireError("header", got=header, expected=expected)
    _verify_checksum(view, pairs_bytes=0)
    return view[HEADER_BYTES:]


def max_rows_per_frame(*, hidden_size: int, dtype: Dtype, mode: OutputMode, top_k: int) -> int:
    """Return how many rows with `top_k` pairs each fit in one request and in its response.

    Raises:
        WireError: not even one row fits.
    """
    row_bytes = hidden_size * dtype.itemsize
    request_bytes = row_bytes + top_k * PAIR_BYTES
    response_bytes = row_bytes * top_k
    if mode is OutputMode.REDUCED:
        response_bytes = hidden_size * Dtype.FLOAT32.itemsize
    rows = (MAX_FRAME_BYTES - HEADER_BYTES) // max(request_bytes, response_bytes)
    rows = min(rows, MAX_PAIRS_BYTES // (row_bytes * max(top_k, 1)))
    if rows < 1:
        raise WireError("hidden_size", got=hidden_size, expected="one row to fit into a frame")
    return rows


def _unpack_header(frame: memoryview, *, kind: FrameKind) -> FrameHeader:
    """Parse and validate the header of a complete frame.

    Does not check the checksum, see `_verify_checksum`.

    Raises:
        WireError: a field is invalid, or the frame's length does not match its header.
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
    if dtype not in _DTYPES:
        raise WireError("dtype", got=dtype, expected="1 (bfloat16), 2 (float16) or 3 (float32)")
    if mode not in _MODES:
        raise WireError("mode", got=mode, expected="0 (reduced) or 1 (unreduced)")
    for field, value in (("n_rows", rows), ("n_pairs", pairs), ("hidden_size", hidden)):
        if value < 1:
            raise WireError(field, got=value, expected="1 or more")
    header = FrameHeader(kind, Dtype(dtype), OutputMode(mode), layer, rows, pairs, hidden)
    _require_equal("payload_bytes", payload, header.payload_bytes)
    _check_pairs_bytes(header)
    _require_equal("frame", f"{len(frame)} bytes", f"{HEADER_BYTES + payload} bytes")
    return header


def _check_pairs_bytes(header: FrameHeader) -> None:
    """Bound the memory that a function allocates, which may far exceed the size of the frame."""
    row_bytes = header.hidden_size * header.dtype.itemsize
    is_unreduced = header.mode is OutputMode.UNREDUCED
    if header.kind is FrameKind.RESPONSE and not is_unreduced:
        return  # a row's vectors were added where they were computed
    limit = MAX_FRAME_BYTES - HEADER_BYTES if is_unreduced else MAX_PAIRS_BYTES
    if header.n_pairs * row_bytes > limit:
        raise WireError(
            "n_pairs", got=header.n_pairs, expected=f"at most {limit // row_bytes} of this size"
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


def _response_header(request: FrameHeader) -> FrameHeader:
    is_reduced = request.mode is OutputMode.REDUCED
    dtype = Dtype.FLOAT32 if is_reduced else request.dtype
    return FrameHeader(
        FrameKind.RESPONSE, dtype, request.mode, request.layer,
        request.n_rows, request.n_pairs, request.hidden_size,
    )  # fmt: skip


def _pack_frame(header: FrameHeader, pairs: bytes, rows: Buffer) -> list[Buffer]:
    """Return the buffers of a frame in order, without copying `rows`."""
    fields = header.pack()
    return [
        b"".join((fields, CHECKSUM_FIELD.pack(frame_checksum(fields + pairs, rows)), pairs)),
        rows,
    ]


def _verify_checksum(frame: memoryview, *, pairs_bytes: int) -> None:
    """Raise WireError unless the frame's checksum matches its bytes."""
    (stored,) = CHECKSUM_FIELD.unpack_from(frame, HEADER_FIELDS_BYTES)
    start = HEADER_BYTES + pairs_bytes
    head = bytes(frame[:HEADER_FIELDS_BYTES]) + bytes(frame[HEADER_BYTES:start])
    _require_equal("checksum", stored, frame_checksum(head, frame[start:]))


def frame_checksum(head: Buffer, rows: Buffer) -> int:
    """Return the 32-bit checksum of a frame; it detects every single flipped bit.

    TCP's checksum misses corruption in proxies, buffers and host memory. The head is covered by
    CRC-32 and the rows by a sum of 8-byte words, because a CRC of the rows would take as long as
    the rest of a call.

    Args:
        head: bytes of the frame before the rows, without the 4-byte checksum itself.
        rows: bytes of the rows.
    """
    total = _word_sum(rows)
    # Adding both halves covers all 64 bits: a flipped bit changes the result, carry or not.
    return (zlib.crc32(head) + (total & _MASK) + (total >> 32)) & _MASK


def _word_sum(data: Buffer) -> int:
    """Return the sum modulo 2^64 of little-endian 8-byte words; the last one is zero-padded."""
    size_bytes = memoryview(data).nbytes
    n_whole = size_bytes // 8
    words: NDArray[np.uint64] = np.frombuffer(data, _WORD, n_whole)
    total = int(np.add.reduce(words))
    if size_bytes % 8:
        rest = bytes(memoryview(data).cast("B")[8 * n_whole :])
        total += int.from_bytes(rest, "little")
    return total & 0xFFFFFFFFFFFFFFFF


def _require_equal(field: str, got: object, expected: object) -> None:
    if got != expected:
        raise WireError(field, got=got, expected=expected)
