"""Requests for the same experts, computed as one, and each one's part of what comes out. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import numpy as np
from torch import Tensor

from faasmoe_expert.wire import Header, Kind, Mode, Request


def likeness(request: Request) -> Hashable:
    """Return what requests of one function must have in common to be computed as one."""
    header = request.header
    return header.layer, header.dtype, header.mode, header.hidden_size


def joined(requests: Sequence[Request]) -> Request:
    """Return one request with the rows of all, in order; they must be alike, see `likeness`."""
    if len(requests) == 1:
        return requests[0]
    first = requests[0].header
    header = Header(
        Kind.REQUEST,
        first.dtype,
        first.mode,
        first.layer,
        sum(r.header.n_rows for r in requests),
        sum(r.header.n_pairs for r in requests),
        first.hidden_size,
    )
    firsts = np.cumsum([0, *(r.header.n_rows for r in requests[:-1])], dtype=np.int32)
    return Request(
        header,
        np.concatenate([r.pair_row + n for r, n in zip(requests, firsts, strict=True)]),
        np.concatenate([r.pair_expert for r in requests]),
        np.concatenate([r.pair_weight for r in requests]),
        memoryview(bytearray().join(r.rows for r in requests)),
    )


def parts(output: Tensor, requests: Sequence[Request]) -> Iterator[Tensor]:
    """Give each request's part of the output of `joined`.

    Args:
        output: [T, H] in reduced mode, [P, H] in unreduced mode, over all requests.
        requests: as they were joined.
    """
    begin = 0
    for request in requests:
        header = request.header
        end = begin + (header.n_pairs if header.mode is Mode.UNREDUCED else header.n_rows)
        yield output[begin:end]  # [t, H] or [p, H]
        begin = end
