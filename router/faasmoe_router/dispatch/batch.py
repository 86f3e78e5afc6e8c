"""One layer's calls for one batch: frames out, parts in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from faasmoe_expert.table import FunctionSpec
from faasmoe_expert.wire import (
    Dtype,
    Header,
    Mode,
    Request,
    WireError,
    decode_response,
    encode_request,
)
from faasmoe_expert.wire.checksum import Buffer
from faasmoe_expert.wire.frame import Kind
from faasmoe_router.dispatch.errors import CallError
from faasmoe_router.dispatch.grouping import Group
from faasmoe_router.dispatch.hot import HotFunctions
from faasmoe_router.dispatch.local import LocalFunctions
from faasmoe_router.dispatch.sums import Way, new_sum

WIRE_DTYPES = {
    torch.bfloat16: Dtype.BFLOAT16,
    torch.float16: Dtype.FLOAT16,
    torch.float32: Dtype.FLOAT32,
}


class LayerBatch:
    """A batch at one layer.

    Args:
        hidden: [T, H] on the CPU, contiguous.
        groups: what each call carries.
        layer: index of the MoE layer.
        mode: reduced or unreduced.
        top_k: slots k of each token.
        way: how parts get to where they are added; None adds them on the host.
    """

    def __init__(
        self,
        hidden: Tensor,
        groups: Sequence[Group],
        *,
        layer: int,
        mode: Mode,
        top_k: int,
        way: Way | None = None,
    ) -> None:
        self.groups = groups
        self._hidden = hidden
        self._layer = layer
        self._mode = mode
        self._dtype = WIRE_DTYPES[hidden.dtype]
        self._bytes = hidden.view(torch.uint8).numpy()  # [T, H * itemsize]
        self._sum = new_sum(hidden, mode=mode, top_k=top_k, way=way)

    @property
    def n_rows(self) -> int:
        """Tokens T of the batch."""
        return len(self._bytes)

    def frame(self, position: int) -> Sequence[Buffer]:
        """Return the request frame of the call at `position`."""
        group = self.groups[position]
        return encode_request(
            self._rows(group),
            dtype=self._dtype,
            mode=self._mode,
            layer=self._layer,
            hidden_size=self._hidden.shape[1],
            n_rows=len(group.rows),
            pair_row=group.pair_row,
            pair_expert=group.pair_expert,
            pair_weight=group.pair_weight,
        )

    def take(self, position: int, frame: memoryview) -> None:
        """Take the response frame of the call at `position`; raises CallError if it is bad."""
        try:
            body = decode_response(frame, self._header(self.groups[position]))
        except WireError as error:
            raise CallError(f"bad response frame: {error}") from error
        part = torch.frombuffer(body, dtype=self._hidden.dtype)  # the sum copies what it keeps
        part = part.view(-1, self._hidden.shape[1])  # [T, H], or [P, H] unreduced
        if not _is_finite(part) and _is_finite(self._hidden):
            raise CallError("bad response frame: got numbers that are not finite")
        self._sum.put(position, self.groups[position], part)

    def compute(
        self, position: int, functions: LocalFunctions | HotFunctions, spec: FunctionSpec
    ) -> None:
        """Compute the call at `position` in this process."""
        group = self.groups[position]
        rows = memoryview(bytearray(self._rows(group)))
        request = Request(
            self._header(group), group.pair_row, group.pair_expert, group.pair_weight, rows
        )
        self._sum.put(position, group, functions.compute(spec, request))

    def result(self) -> Tensor:
        """Return the sum of all parts where they are added, [T, H]."""
        return self._sum.result()

    def _rows(self, group: Group) -> Buffer:
        whole = len(group.rows) == len(self._bytes)
        chosen = self._bytes if whole else np.take(self._bytes, group.rows, axis=0)
        return chosen.data.cast("B")

    def _header(self, group: Group) -> Header:
        return Header(
            Kind.REQUEST, self._dtype, self._mode, self._layer,
            len(group.rows), len(group.pair_row), self._hidden.shape[1],
        )  # fmt: skip


def _is_finite(numbers: Tensor) -> bool:
    # Their sum first: it takes a fiftieth of the time, and is finite if all of them are, mostly.
    total = numbers.sum(dtype=torch.float32)
    return bool(total.isfinite()) or bool(numbers.isfinite().all())
