"""The wire format between router and sandboxes: one binary frame each way. See docs/wire.md.

Knows bytes and numpy views of them; knows nothing of torch, HTTP, functions or stores.
"""

from faasmoe_expert.wire.errors import WireError
from faasmoe_expert.wire.frame import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    MAX_PAIRS_BYTES,
    Dtype,
    Header,
    Kind,
    Mode,
    rows_per_frame,
)
from faasmoe_expert.wire.request import Request, decode_request, encode_request
from faasmoe_expert.wire.response import decode_response, encode_response

__all__ = [
    "HEADER_BYTES",
    "MAX_FRAME_BYTES",
    "MAX_PAIRS_BYTES",
    "Dtype",
    "Header",
    "Kind",
    "Mode",
    "Request",
    "WireError",
    "decode_request",
    "decode_response",
    "encode_request",
    "encode_response",
    "rows_per_frame",
]
