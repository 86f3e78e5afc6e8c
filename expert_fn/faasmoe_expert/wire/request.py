"""Request frames: rows of hidden states and the experts that each row is for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from faasmoe_expert.wire.checksum import Buffer
from faasmoe_expert.wire.errors import WireError
from faasmoe_expert.wire.frame import (
    HEADER_BYTES,
    PAIR_BYTES,
    Dtype,
    Header,
    Kind,
    Mode,
    check_frame,
    pack_frame,
    unpack_header,
)

Int32s = NDArray[np.int32]
Float32s = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Request:
    """What a function is asked to compute. Arrays are views of the frame, not copies.

    Attributes:
        header: dtype, mode, layer and sizes.
        pair_row: row of each pair, int32 [P], ascending, each in 0..T-1.
        pair_expert: global expert index of each pair, int32 [P], 0 or more.
        pair_weight: routing weight of each pair, float32 [P], finite.
        rows: raw bytes of the hidden states [T, H], of `header.dtype`.
    """

    header: Header
    pair_row: Int32s
    pair_expert: Int32s
    pair_weight: Float32s
    rows: memoryview


def encode_request(
    rows: Buffer,
    *,
    dtype: Dtype,
    mode: Mode,
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
    header = Header(Kind.REQUEST, dtype, mode, layer, n_rows, len(pair_row), hidden_size)
    pairs = b"".join((pair_row.tobytes(), pair_expert.tobytes(), pair_weight.tobytes()))
    return pack_frame(header, pairs, rows)


def decode_request(frame: Buffer) -> Request:
    """Read a request frame; raises WireError that names the field.

    The expert indices are checked against the block by the function, which knows it.
    """
    view = memoryview(frame)
    header = unpack_header(view, kind=Kind.REQUEST)
    n_pairs, start = header.n_pairs, HEADER_BYTES
    check_frame(view, pairs_bytes=PAIR_BYTES * n_pairs)
    pair_row = np.frombuffer(view, np.dtype("<i4"), n_pairs, start)
    pair_expert = np.frombuffer(view, np.dtype("<i4"), n_pairs, start + 4 * n_pairs)
    pair_weight = np.frombuffer(view, np.dtype("<f4"), n_pairs, start + 8 * n_pairs)
    _check_pairs(pair_row, pair_expert, pair_weight, n_rows=header.n_rows)
    return Request(header, pair_row, pair_expert, pair_weight, view[start + PAIR_BYTES * n_pairs :])


def _check_pairs(row: Int32s, expert: Int32s, weight: Float32s, *, n_rows: int) -> None:
    if row[0] < 0 or row[-1] >= n_rows or (len(row) > 1 and bool((row[1:] < row[:-1]).any())):
        raise WireError("pair_row", got=_sample(row), expected=f"ascending rows in 0..{n_rows - 1}")
    if int(expert.min()) < 0:
        raise WireError("pair_expert", got=_sample(expert), expected="expert indices of 0 or more")
    if not bool(np.isfinite(weight).all()):
        raise WireError("pair_weight", got=_sample(weight), expected="finite weights")


def _sample(values: Int32s | Float32s) -> str:
    shown = ", ".join(str(v) for v in values[:8])
    return f"[{shown}{', …' if len(values) > 8 else ''}]"
