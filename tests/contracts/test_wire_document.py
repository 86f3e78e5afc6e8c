"""The test vectors of docs/wire.md match the implementation."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faasmoe_contracts.wire import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    MAX_PAIRS_BYTES,
    Dtype,
    FrameHeader,
    FrameKind,
    OutputMode,
    WireError,
    decode_request,
    decode_response,
    encode_request,
    encode_response,
)

DOCUMENT = (Path(__file__).parents[2] / "docs" / "wire.md").read_text(encoding="utf-8")
_VECTOR = re.compile(r"### ([^\n]+)\n\n```json\n(.+?)\n```\n\n```hex\n(.+?)\n```", re.DOTALL)
VECTORS = [
    (title, json.loads(fields), bytes.fromhex(text))
    for title, fields, text in _VECTOR.findall(DOCUMENT)
]
REQUESTS = [pytest.param(*v, id=title) for title, *v in VECTORS if v[0].get("kind") == "request"]
RESPONSES = [pytest.param(*v, id=title) for title, *v in VECTORS if v[0].get("kind") == "response"]
MALFORMED = [pytest.param(*v, id=title) for title, *v in VECTORS if "field" in v[0]]


def header_of(fields: dict[str, Any]) -> FrameHeader:
    return FrameHeader(
        FrameKind.REQUEST,
        Dtype[fields["dtype"].upper()],
        OutputMode[fields["mode"].upper()],
        *(fields[name] for name in ("layer", "n_rows", "n_pairs", "hidden_size")),
    )


def test_document_has_all_kinds_of_vectors() -> None:
    assert [len(REQUESTS), len(RESPONSES), len(MALFORMED)] == [3, 2, 5]


@pytest.mark.parametrize(("fields", "frame"), REQUESTS)
def test_encodes_documented_requests(fields: dict[str, Any], frame: bytes) -> None:
    header = header_of(fields)
    buffers = encode_request(
        bytes.fromhex(fields["rows"]),
        dtype=header.dtype,
        mode=header.mode,
        layer=header.layer,
        hidden_size=header.hidden_size,
        n_rows=header.n_rows,
        pair_row=np.array(fields["pair_row"], dtype=np.int32),
        pair_expert=np.array(fields["pair_expert"], dtype=np.int32),
        pair_weight=np.array(fields["pair_weight"], dtype=np.float32),
    )
    assert b"".join(buffers) == frame


@pytest.mark.parametrize(("fields", "frame"), REQUESTS)
def test_decodes_documented_requests(fields: dict[str, Any], frame: bytes) -> None:
    request = decode_request(frame)
    assert request.header == header_of(fields)
    for name in ("pair_row", "pair_expert", "pair_weight"):
        assert getattr(request, name).tolist() == fields[name]
    assert bytes(request.rows).hex() == fields["rows"]


@pytest.mark.parametrize(("fields", "frame"), RESPONSES)
def test_encodes_and_decodes_documented_responses(fields: dict[str, Any], frame: bytes) -> None:
    header = header_of(fields)
    assert b"".join(encode_response(header, bytes.fromhex(fields["outputs"]))) == frame
    assert bytes(decode_response(frame, header)).hex() == fields["outputs"]


@pytest.mark.parametrize(("fields", "frame"), MALFORMED)
def test_rejects_documented_malformed_frames_by_field(fields: dict[str, Any], frame: bytes) -> None:
    with pytest.raises(WireError) as refused:
        decode_request(frame)
    assert refused.value.field == fields["field"]


def test_documented_limits_match_the_constants() -> None:
    assert f"({MAX_FRAME_BYTES} bytes)" in DOCUMENT
    assert f"({MAX_PAIRS_BYTES} bytes)" in DOCUMENT
    assert f"A {HEADER_BYTES}-byte header" in DOCUMENT
