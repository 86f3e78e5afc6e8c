"""Response frames: one vector for each row (reduced) or each pair (unreduced)."""

from __future__ import annotations

from faasmoe_expert.wire.checksum import Buffer
from faasmoe_expert.wire.errors import WireError
from faasmoe_expert.wire.frame import (
    FIELDS_BYTES,
    HEADER_BYTES,
    Header,
    Kind,
    check_frame,
    pack_frame,
    unpack_header,
)


def encode_response(request: Header, outputs: Buffer) -> list[Buffer]:
    """Return the buffers of the frame that answers `request`.

    Args:
        request: header of the request.
        outputs: bytes of the outputs, [T, H] reduced or [P, H] unreduced, in the request's dtype.
    """
    header = _answer(request)
    size_bytes = len(memoryview(outputs).cast("B"))
    if size_bytes != header.payload_bytes:
        raise WireError("outputs", got=f"{size_bytes} bytes", expected=header.payload_bytes)
    return pack_frame(header, b"", outputs)


def decode_response(frame: Buffer, request: Header) -> memoryview:
    """Return the outputs' bytes in the frame that answers `request`, not copied.

    Raises WireError if the frame is malformed or answers another request.
    """
    view = memoryview(frame)
    expected = _answer(request)
    if bytes(view[:FIELDS_BYTES]) != expected.pack() or len(view) != expected.frame_bytes:
        header = unpack_header(view, kind=Kind.RESPONSE)  # which names the field
        raise WireError("header", got=header, expected=expected)
    check_frame(view, pairs_bytes=0)
    return view[HEADER_BYTES:]


def _answer(request: Header) -> Header:
    return Header(
        Kind.RESPONSE, request.dtype, request.mode, request.layer,
        request.n_rows, request.n_pairs, request.hidden_size,
    )  # fmt: skip
