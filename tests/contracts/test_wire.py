"""Frames round-trip; whatever else arrives is refused by the name of a field."""

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


def encoded(fields: dict[str, Any]) -> bytes:
    return b"".join(encode_request(**fields))


def small(**changes: Any) -> bytes:
    """A small frame with some header fields replaced by raw values."""
    values = {
        "magic": b"FMOE",
        "version": 2,
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
    right = frame_checksum(header + body[:36], body[36:])
    return header + struct.pack("<I", changes.get("checksum", right)) + body


def payload(
    row: tuple[int, ...] = (0, 0, 1),
    expert: tuple[int, ...] = (0, 1, 0),
    weight: tuple[float, ...] = (0.5, 0.5, 1.0),
) -> bytes:
    return struct.pack("<3i3i3f", *row, *expert, *weight) + bytes(32)


@given(requests())
def test_a_request_comes_back_as_it_went(fields: dict[str, Any]) -> None:
    request = decode_request(encoded(fields))
    header = request.header
    assert bytes(request.rows) == fields["rows"]
    for name in ("dtype", "mode", "layer", "hidden_size", "n_rows"):
        assert getattr(header, name) == fields[name]
    for name in ("pair_row", "pair_expert", "pair_weight"):
        np.testing.assert_array_equal(getattr(request, name), fields[name])


@given(requests(), st.data())
def test_a_response_comes_back_as_it_went(fields: dict[str, Any], data: st.DataObject) -> None:
    header = decode_request(encoded(fields)).header
    vectors = header.n_pairs if header.mode is OutputMode.UNREDUCED else header.n_rows
    size_bytes = vectors * header.hidden_size * header.dtype.itemsize
    outputs = data.draw(st.binary(min_size=size_bytes, max_size=size_bytes))
    frame = b"".join(encode_response(header, outputs))
    assert bytes(decode_response(frame, header)) == outputs


@given(requests(), st.data())
def test_a_changed_request_is_decoded_or_refused_by_a_field(
    fields: dict[str, Any], data: st.DataObject
) -> None:
    frame = bytearray(encoded(fields))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    decoded_or_refused(bytes(frame))


@given(requests(), st.data())
def test_every_flipped_bit_is_found_in_both_directions(
    fields: dict[str, Any], data: st.DataObject
) -> None:
    frame = bytearray(encoded(fields))
    header = decode_request(bytes(frame)).header
    answer = bytearray(b"".join(encode_response(header, os.urandom(_answer_bytes(header)))))
    for one in (frame, answer):
        bit = data.draw(st.integers(0, 8 * len(one) - 1))
        one[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError):
        decode_request(bytes(frame))
    with pytest.raises(WireError):
        decode_response(bytes(answer), header)


def test_a_flipped_bit_of_every_row_is_found_whatever_carries() -> None:
    for rows in (bytes(16), b"\xff" * 16, os.urandom(16), b"\xff" * 4 + bytes(12), bytes(13)):
        right = frame_checksum(b"before", rows)
        for bit in range(8 * len(rows)):
            flipped = bytearray(rows)
            flipped[bit // 8] ^= 1 << bit % 8
            assert frame_checksum(b"before", flipped) != right


@given(requests(), st.data())
def test_a_cut_or_lengthened_request_is_refused(
    fields: dict[str, Any], data: st.DataObject
) -> None:
    frame = encoded(fields)
    cut = frame[: data.draw(st.integers(0, len(frame) - 1))]
    longer = frame + data.draw(st.binary(min_size=1, max_size=64))
    for wrong in (cut, longer):
        with pytest.raises(WireError, match=r"^frame: got .*, expected "):
            decode_request(wrong)


@given(st.binary(max_size=200), st.sampled_from([b"", b"FMOE\x02\x01"]))
@settings(max_examples=300)
def test_garbage_is_decoded_or_refused_by_a_field(garbage: bytes, start: bytes) -> None:
    decoded_or_refused(start + garbage)


@given(requests(), st.data())
def test_a_response_to_another_request_is_refused(
    fields: dict[str, Any], data: st.DataObject
) -> None:
    header = decode_request(encoded(fields)).header
    frame = bytearray(b"".join(encode_response(header, bytes(_answer_bytes(header)))))
    position = data.draw(st.integers(0, HEADER_BYTES - 1))
    frame[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(WireError):
        decode_response(bytes(frame), header)


def _answer_bytes(header: FrameHeader) -> int:
    vectors = header.n_pairs if header.mode is OutputMode.UNREDUCED else header.n_rows
    return vectors * header.hidden_size * header.dtype.itemsize


def decoded_or_refused(frame: bytes) -> None:
    """Any error but a WireError fails the test."""
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
        pytest.param(small()[:31], "frame", id="shorter than a header"),
        pytest.param(small()[:-1], "frame", id="truncated"),
        pytest.param(small() + b"\0", "frame", id="bytes after the end"),
        pytest.param(bytes(MAX_FRAME_BYTES + 1), "frame", id="oversized"),
        pytest.param(small(magic=b"HTTP"), "magic", id="no frame at all"),
        pytest.param(small(version=0), "version", id="version 0"),
        pytest.param(small(version=3), "version", id="version to come"),
        pytest.param(small(kind=2), "kind", id="a response"),
        pytest.param(small(dtype=0), "dtype", id="dtype 0"),
        pytest.param(small(dtype=4), "dtype", id="dtype unknown"),
        pytest.param(small(dtype=2), "payload_bytes", id="dtype of another size"),
        pytest.param(small(mode=2), "mode", id="mode unknown"),
        pytest.param(small(reserved=1), "reserved", id="reserved"),
        pytest.param(small(checksum=0), "checksum", id="another checksum"),
        pytest.param(small(n_rows=0), "n_rows", id="no rows"),
        pytest.param(small(n_pairs=0), "n_pairs", id="no pairs"),
        pytest.param(small(hidden_size=0), "hidden_size", id="no elements"),
        pytest.param(small(n_rows=2**32 - 1), "payload_bytes", id="4 billion rows"),
        pytest.param(small(hidden_size=0x7FC00000), "payload_bytes", id="shape with NaN's bits"),
        pytest.param(small(payload_bytes=67), "payload_bytes", id="mis-sized"),
        pytest.param(small(payload=payload(row=(0, 1, 0))), "pair_row", id="rows not ascending"),
        pytest.param(small(payload=payload(row=(0, 0, 2))), "pair_row", id="row beyond the rows"),
        pytest.param(small(payload=payload(row=(-1, 0, 1))), "pair_row", id="negative row"),
        pytest.param(
            small(payload=payload(expert=(0, -1, 0))), "pair_expert", id="negative expert"
        ),
        pytest.param(
            small(payload=payload(weight=(1, float("nan"), 1))), "pair_weight", id="weight NaN"
        ),
        pytest.param(
            small(payload=payload(weight=(1, float("-inf"), 1))), "pair_weight", id="weight -inf"
        ),
    ],
)
def test_a_malformed_request_is_refused_by_its_field(frame: bytes, field: str) -> None:
    with pytest.raises(WireError) as refused:
        decode_request(frame)
    assert refused.value.field == field
    decoded_or_refused(frame)


def test_hidden_states_may_be_anything() -> None:
    rows = np.array([[np.nan, np.inf, -np.inf, 1e-45]] * 2, dtype=np.float32)
    request = decode_request(small(payload=payload()[:36] + rows.tobytes()))
    assert bytes(request.rows) == rows.tobytes()


@pytest.mark.parametrize("mode", OutputMode)
def test_a_small_frame_cannot_ask_for_unbounded_memory(mode: OutputMode) -> None:
    hidden_size, n_pairs = 8192, 300_000  # 9.8 GB, gathered or returned
    frame = encoded(
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
def test_a_batch_is_split_into_the_largest_frames_that_fit(
    hidden_size: int, dtype: Dtype, mode: OutputMode, top_k: int
) -> None:
    n_rows = max_rows_per_frame(hidden_size=hidden_size, dtype=dtype, mode=mode, top_k=top_k)
    assert n_rows >= 1
    assert fits(n_rows, hidden_size, dtype, mode, top_k)
    assert not fits(n_rows + 1, hidden_size, dtype, mode, top_k)


def fits(n_rows: int, hidden_size: int, dtype: Dtype, mode: OutputMode, top_k: int) -> bool:
    shape = (dtype, mode, 0, n_rows, n_rows * top_k, hidden_size)
    sizes = [HEADER_BYTES + FrameHeader(kind, *shape).payload_bytes for kind in FrameKind]
    gathered = n_rows * top_k * hidden_size * dtype.itemsize
    return max(sizes) <= MAX_FRAME_BYTES and gathered <= MAX_PAIRS_BYTES


def test_a_row_too_large_for_a_frame_is_refused() -> None:
    with pytest.raises(WireError, match="hidden_size: got 3000000"):
        max_rows_per_frame(
            hidden_size=3_000_000, dtype=Dtype.FLOAT32, mode=OutputMode.REDUCED, top_k=1
        )


def test_outputs_of_another_size_are_not_sent() -> None:
    header = decode_request(small()).header
    with pytest.raises(WireError, match="outputs: got 31 bytes, expected 32"):
        encode_response(header, bytes(31))
