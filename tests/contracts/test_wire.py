"""Frames round-trip, and malformed ones raise WireError naming a field."""

import os
import struct
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from faasmoe_contracts.wire import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    MAX_PAIRS_BYTES,
    Dtype,
    ExpertRequest,
    FrameHeader,
    FrameKind,
    OutputMode,
    WireError,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
    frame_checksum,
    max_rows_per_frame,
)

FIELDS = {
    "frame", "magic", "version", "kind", "reserved", "dtype", "mode", "n_rows", "n_pairs",
    "hidden_size", "payload_bytes", "checksum", "pair_row", "pair_expert", "pair_weight",
}  # fmt: skip
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    dtype, mode = draw(st.sampled_from(Dtype)), draw(st.sampled_from(OutputMode))
    n_rows, hidden_size = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    pair_row = sorted(draw(st.lists(st.integers(0, n_rows - 1), min_size=1, max_size=12)))
    size_bytes = n_rows * hidden_size * dtype.itemsize
    n_pairs = len(pair_row)
    experts = hnp.arrays(np.int32, n_pairs, elements=st.integers(0, 2**31 - 1))
    return {
        "rows": draw(st.binary(min_size=size_bytes, max_size=size_bytes)),
        "dtype": dtype,
        "mode": mode,
        "layer": draw(st.integers(0, 65535)),
        "hidden_size": hidden_size,
        "n_rows": n_rows,
        "pair_row": np.array(pair_row, dtype=np.int32),
        "pair_expert": draw(experts),
        "pair_weight": draw(hnp.arrays(np.float32, n_pairs, elements=FINITE)),
    }


def encode(fields: dict[str, Any]) -> bytes:
    return b"".join(encode_request(**fields))


def small_frame(**changes: Any) -> bytes:
    """Return a small frame with raw values for some header fields."""
    values = {
        "magic": b"FMOE",
        "version": 3,
        "kind": 1,
        "dtype": 3,
        "mode": 0,
        "layer": 0,
        "reserved": 0,
        "n_rows": 2,
        "n_pairs": 3,
        "hidden_size": 4,
        "payload_bytes": 68,
    } | {name: value for name, value in changes.items() if name not in ("payload", "checksum")}
    header = struct.pack("<4sBBBBHHIIII", *values.values())
    body: bytes = changes.get("payload", payload())
    checksum = frame_checksum(header + body[:36], body[36:])
    return header + struct.pack("<I", changes.get("checksum", checksum)) + body


def payload(
    row: tuple[int, ...] = (0, 0, 1),
    expert: tuple[int, ...] = (0, 1, 0),
    weight: tuple[float, ...] = (0.5, 0.5, 1.0),
) -> bytes:
    return struct.pack("<3i3i3f", *row, *expert, *weight) + bytes(32)


@given(requests())
def test_request_round_trips(fields: dict[str, Any]) -> None:
    request = decode_request(encode(fields))
    header = request.header
    assert bytes(request.rows) == fields["rows"]
    for name in ("dtype", "mode", "layer", "hidden_size", "n_rows"):
        assert getattr(header, name) == fields[name]
    for name in ("pair_row", "pair_expert", "pair_weight"):
        np.testing.assert_array_equal(getattr(request, name), fields[name])


@given(requests(), st.data())
def test_response_round_trips(fields: dict[str, Any], data: st.DataObject) -> None:
    header = decode_request(encode(fields)).header
    size_bytes = _response_bytes(header)
    outputs = data.draw(st.binary(min_size=size_bytes, max_size=size_bytes))
    frame = b"".join(encode_response(header, outputs))
    assert bytes(decode_response(frame, header)) == outputs


@given(requests(), st.data())
def test_mutated_request_decodes_or_raises_wire_error(
    fields: dict[str, Any], data: st.DataObject
) -> None:
    frame = bytearray(encode(fields))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    assert_decodes_or_raises_wire_error(bytes(frame))


@given(requests(), st.data())
def test_detects_any_flipped_bit_in_requests_and_responses(
    fields: dict[str, Any], data: st.DataObject
) -> None:
    frame = bytearray(encode(fields))
    header = decode_request(bytes(frame)).header
    answer = bytearray(b"".join(encode_response(header, os.urandom(_response_bytes(header)))))
    for one in (frame, answer):
        bit = data.draw(st.integers(0, 8 * len(one) - 1))
        one[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError):
        decode_request(bytes(frame))
    with pytest.raises(WireError):
        decode_response(bytes(answer), header)


def test_checksum_detects_a_flipped_bit_despite_carries() -> None:
    for rows in (bytes(16), b"\xff" * 16, os.urandom(16), b"\xff" * 4 + bytes(12), bytes(13)):
        checksum = frame_checksum(b"before", rows)
        for bit in range(8 * len(rows)):
            flipped = bytearray(rows)
            flipped[bit // 8] ^= 1 << bit % 8
            assert frame_checksum(b"before", flipped) != checksum


@given(requests(), st.data())
def test_rejects_truncated_and_extended_requests(
    fields: dict[str, Any], data: st.DataObject
) -> None:
    frame = encode(fields)
    cut = frame[: data.draw(st.integers(0, len(frame) - 1))]
    longer = frame + data.draw(st.binary(min_size=1, max_size=64))
    for wrong in (cut, longer):
        with pytest.raises(WireError, match=r"^frame: got .*, expected "):
            decode_request(wrong)


@given(st.binary(max_size=200), st.sampled_from([b"", b"FMOE\x02\x01"]))
@settings(max_examples=300)
def test_garbage_decodes_or_raises_wire_error(garbage: bytes, start: bytes) -> None:
    assert_decodes_or_raises_wire_error(start + garbage)


@given(requests(), st.data())
def test_rejects_a_response_with_another_header(
    fields: dict[str, Any], data: st.DataObject
) -> None:
    header = decode_request(encode(fields)).header
    frame = bytearray(b"".join(encode_response(header, bytes(_response_bytes(header)))))
    position = data.draw(st.integers(0, HEADER_BYTES - 1))
    frame[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(WireError):
        decode_response(bytes(frame), header)


def _response_bytes(header: FrameHeader) -> int:
    if header.mode is OutputMode.UNREDUCED:
        return header.n_pairs * header.hidden_size * header.dtype.itemsize
    return header.n_rows * header.hidden_size * 4  # sums are float32


def assert_decodes_or_raises_wire_error(frame: bytes) -> None:
    """Decode a frame; fail on any exception but a well-formed WireError."""
    decoded = _decode(frame)
    if isinstance(decoded, WireError):
        assert decoded.field in FIELDS
        assert str(decoded).startswith(f"{decoded.field}: got ")
        assert ", expected " in str(decoded)
        return
    assert len(decoded.pair_row) == decoded.header.n_pairs
    assert decoded.pair_row.min() >= 0
    assert decoded.pair_row.max() < decoded.header.n_rows


def _decode(frame: bytes) -> ExpertRequest | WireError:
    try:
        return decode_request(frame)
    except WireError as error:
        return error


@pytest.mark.parametrize(
    ("frame", "field"),
    [
        pytest.param(b"", "frame", id="empty"),
        pytest.param(small_frame()[:31], "frame", id="shorter than a header"),
        pytest.param(small_frame()[:-1], "frame", id="truncated"),
        pytest.param(small_frame() + b"\0", "frame", id="bytes after the end"),
        pytest.param(bytes(MAX_FRAME_BYTES + 1), "frame", id="oversized"),
        pytest.param(small_frame(magic=b"HTTP"), "magic", id="no frame at all"),
        pytest.param(small_frame(version=0), "version", id="version 0"),
        pytest.param(small_frame(version=4), "version", id="version to come"),
        pytest.param(small_frame(kind=2), "kind", id="a response"),
        pytest.param(small_frame(dtype=0), "dtype", id="dtype 0"),
        pytest.param(small_frame(dtype=4), "dtype", id="dtype unknown"),
        pytest.param(small_frame(dtype=2), "payload_bytes", id="dtype of another size"),
        pytest.param(small_frame(mode=2), "mode", id="mode unknown"),
        pytest.param(small_frame(reserved=1), "reserved", id="reserved"),
        pytest.param(small_frame(checksum=0), "checksum", id="another checksum"),
        pytest.param(small_frame(n_rows=0), "n_rows", id="no rows"),
        pytest.param(small_frame(n_pairs=0), "n_pairs", id="no pairs"),
        pytest.param(small_frame(hidden_size=0), "hidden_size", id="no elements"),
        pytest.param(small_frame(n_rows=2**32 - 1), "payload_bytes", id="4 billion rows"),
        pytest.param(
            small_frame(hidden_size=0x7FC00000), "payload_bytes", id="shape with NaN's bits"
        ),
        pytest.param(small_frame(payload_bytes=67), "payload_bytes", id="mis-sized"),
        pytest.param(
            small_frame(payload=payload(row=(0, 1, 0))), "pair_row", id="rows not ascending"
        ),
        pytest.param(
            small_frame(payload=payload(row=(0, 0, 2))), "pair_row", id="row beyond the rows"
        ),
        pytest.param(small_frame(payload=payload(row=(-1, 0, 1))), "pair_row", id="negative row"),
        pytest.param(
            small_frame(payload=payload(expert=(0, -1, 0))), "pair_expert", id="negative expert"
        ),
        pytest.param(
            small_frame(payload=payload(weight=(1, float("nan"), 1))),
            "pair_weight",
            id="weight NaN",
        ),
        pytest.param(
            small_frame(payload=payload(weight=(1, float("-inf"), 1))),
            "pair_weight",
            id="weight -inf",
        ),
    ],
)
def test_rejects_malformed_requests_by_field(frame: bytes, field: str) -> None:
    with pytest.raises(WireError) as refused:
        decode_request(frame)
    assert refused.value.field == field
    assert_decodes_or_raises_wire_error(frame)


def test_accepts_non_finite_hidden_states() -> None:
    rows = np.array([[np.nan, np.inf, -np.inf, 1e-45]] * 2, dtype=np.float32)
    request = decode_request(small_frame(payload=payload()[:36] + rows.tobytes()))
    assert bytes(request.rows) == rows.tobytes()


@pytest.mark.parametrize("mode", OutputMode)
def test_bounds_the_memory_that_a_small_frame_requires(mode: OutputMode) -> None:
    hidden_size, n_pairs = 8192, 300_000  # 9.8 GB of gathered or returned rows
    frame = encode(
        {
            "rows": bytes(hidden_size * 4),
            "dtype": Dtype.FLOAT32,
            "mode": mode,
            "layer": 0,
            "hidden_size": hidden_size,
            "n_rows": 1,
            "pair_row": np.zeros(n_pairs, np.int32),
            "pair_expert": np.zeros(n_pairs, np.int32),
            "pair_weight": np.ones(n_pairs, np.float32),
        }
    )
    assert len(frame) < MAX_FRAME_BYTES
    with pytest.raises(WireError, match="n_pairs: got 300000, expected at most"):
        decode_request(frame)


@given(
    hidden_size=st.integers(1, 30_000),
    dtype=st.sampled_from(Dtype),
    mode=st.sampled_from(OutputMode),
    top_k=st.integers(1, 64),
)
def test_max_rows_per_frame_is_the_largest_that_fits(
    hidden_size: int, dtype: Dtype, mode: OutputMode, top_k: int
) -> None:
    n_rows = max_rows_per_frame(hidden_size=hidden_size, dtype=dtype, mode=mode, top_k=top_k)
    assert n_rows >= 1
    assert fits_in_a_frame(n_rows, hidden_size, dtype, mode, top_k)
    assert not fits_in_a_frame(n_rows + 1, hidden_size, dtype, mode, top_k)


def fits_in_a_frame(
    n_rows: int, hidden_size: int, dtype: Dtype, mode: OutputMode, top_k: int
) -> bool:
    shape = (mode, 0, n_rows, n_rows * top_k, hidden_size)
    answer = Dtype.FLOAT32 if mode is OutputMode.REDUCED else dtype
    sizes = [
        FrameHeader(FrameKind.REQUEST, dtype, *shape).frame_bytes,
        FrameHeader(FrameKind.RESPONSE, answer, *shape).frame_bytes,
    ]
    gathered = n_rows * top_k * hidden_size * dtype.itemsize
    return max(sizes) <= MAX_FRAME_BYTES and gathered <= MAX_PAIRS_BYTES


def test_rejects_a_row_larger_than_a_frame() -> None:
    with pytest.raises(WireError, match="hidden_size: got 3000000"):
        max_rows_per_frame(
            hidden_size=3_000_000, dtype=Dtype.FLOAT32, mode=OutputMode.REDUCED, top_k=1
        )


def test_rejects_outputs_of_another_size() -> None:
    header = decode_request(small_frame()).header
    with pytest.raises(WireError, match="outputs: got 31 bytes, expected 32"):
        encode_response(header, bytes(31))
