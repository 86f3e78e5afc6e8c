"""The native decoder of frames names the same invalid field as the contracts' own."""

import ctypes
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_contracts.wire import (
    CHECKSUM_FIELD,
    HEADER_BYTES,
    HEADER_FIELDS_BYTES,
    Dtype,
    OutputMode,
    WireError,
    decode_request,
    encode_request,
    encode_response,
    frame_checksum,
)
from faasmoe_kernels import KernelsUnavailable, load

DOCUMENT = Path(__file__).parents[2] / "docs" / "wire.md"
VECTOR = re.compile(r"```json\n(.*?)```\s+```hex\n(.*?)```", re.DOTALL)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(load().path))
    except KernelsUnavailable as error:
        pytest.skip(str(error))
    size = ctypes.c_int64
    library.fk_check_request_frame.argtypes = (ctypes.c_char_p, size)
    library.fk_check_response_frame.argtypes = (ctypes.c_char_p, size, ctypes.c_char_p, size)
    for name in ("fk_check_request_frame", "fk_check_response_frame"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def vectors() -> list[tuple[dict[str, Any], bytes]]:
    text = DOCUMENT.read_text(encoding="utf-8")
    return [(json.loads(j), bytes.fromhex("".join(h.split()))) for j, h in VECTOR.findall(text)]


def request_frame(*, dtype: Dtype = Dtype.BFLOAT16, mode: OutputMode = OutputMode.REDUCED) -> bytes:
    """A request of 3 rows of 5 elements, and 4 pairs."""
    parts = encode_request(
        bytes(range(15)) * dtype.itemsize,
        dtype=dtype,
        mode=mode,
        layer=7,
        hidden_size=5,
        n_rows=3,
        pair_row=np.array([0, 0, 2, 2], dtype=np.int32),
        pair_expert=np.array([3, 1, 0, 9], dtype=np.int32),
        pair_weight=np.array([0.5, 0.25, 1, -2], dtype=np.float32),
    )
    return b"".join(bytes(part) for part in parts)


def python_field(frame: bytes) -> str | None:
    try:
        decode_request(frame)
    except WireError as error:
        return error.field
    return None


def native_field(library: ctypes.CDLL, frame: bytes) -> str | None:
    field: bytes | None = library.fk_check_request_frame(frame, len(frame))
    return None if field is None else field.decode()


def with_checksum(frame: bytes) -> bytes:
    """Return the frame with the checksum that its other bytes need."""
    pairs = struct.unpack_from("<I", frame, 16)[0]
    start = min(len(frame), HEADER_BYTES + 12 * pairs)
    head = frame[:HEADER_FIELDS_BYTES] + frame[HEADER_BYTES:start]
    checksum = CHECKSUM_FIELD.pack(frame_checksum(head, frame[start:]))
    return frame[:HEADER_FIELDS_BYTES] + checksum + frame[HEADER_BYTES:]


def test_vectors_of_the_document(library: ctypes.CDLL) -> None:
    request = b""
    for fields, frame in vectors():
        if fields.get("kind") == "response":
            assert library.fk_check_response_frame(frame, len(frame), request, len(request)) is None
            continue
        assert native_field(library, frame) == fields.get("field")
        request = frame if "field" not in fields else request
    assert request


@given(data=st.data())
def test_changed_requests_are_judged_alike(library: ctypes.CDLL, data: st.DataObject) -> None:
    frame = bytearray(
        request_frame(
            dtype=data.draw(st.sampled_from(Dtype)), mode=data.draw(st.sampled_from(OutputMode))
        )
    )
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(frame[: data.draw(st.integers(HEADER_BYTES, len(frame)))])
    for changed in (cut, with_checksum(cut)):
        assert native_field(library, changed) == python_field(changed)


def test_response_to_another_request_is_refused(library: ctypes.CDLL) -> None:
    frame = request_frame()
    header = decode_request(frame).header
    response = b"".join(bytes(part) for part in encode_response(header, bytes(60)))
    check = library.fk_check_response_frame
    assert check(response, len(response), frame, len(frame)) is None
    assert check(response[:-1], len(response) - 1, frame, len(frame)) == b"frame"
    flipped = response[:-1] + b"\x01"
    assert check(flipped, len(flipped), frame, len(frame)) == b"checksum"
    other = with_checksum(frame[:8] + b"\x08" + frame[9:])
    assert check(response, len(response), other, len(other)) == b"header"
