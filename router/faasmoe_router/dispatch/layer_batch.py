"""Adding what functions return, in an order that does not depend on when it arrives.

Each part is added as soon as those before it are, while the others are away. On a GPU the sum is
made there: adding three parts of 64 rows takes the host a quarter of a millisecond, which would be
a large part of a layer (docs/performance.md).

One layer's calls for one batch: frames out, parts in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.wire import (
    Buffer,
    Dtype,
    ExpertRequest,
    FrameHeader,
    FrameKind,
    OutputMode,
    WireError,
    decode_response,
    encode_request,
)
from faasmoe_router.dispatch.calls import CallError
from faasmoe_router.dispatch.colocation import ColocatedFunctions
from faasmoe_router.dispatch.grouping import Group
from faasmoe_router.dispatch.local_functions import LocalFunctions


class DeviceTransfer(Protocol):
    """How parts get to where they are added."""

    @property
    def device(self) -> torch.device:
        """Where they are added."""

    def to_device(self, host: Tensor) -> Tensor:
        """Return a host tensor there, for use before the host's changes."""

    def copy_to_device(self, host: Tensor) -> Tensor:
        """Return a host tensor there, for use afterwards too."""


class HostTransfer:
    """Parts are added on the host, where they are."""

    device = torch.device("cpu")

    def to_device(self, host: Tensor) -> Tensor:
        """Return it."""
        return host

    def copy_to_device(self, host: Tensor) -> Tensor:
        """Return a copy."""
        return host.clone()


class Reducer(Protocol):
    """Collects the parts of one layer."""

    def add(self, position: int, group: Group, output: Tensor) -> None:
        """Take the outputs of the call at `position`; copies what it keeps."""

    def result(self) -> Tensor:
        """Return [T, H], once all parts are there."""


class PartialSumReducer:
    """Adds partial sums in float32, in the order of the calls.

    Args:
        hidden: the batch, [T, H], anywhere: its shape and dtype are those of the sum.
        way: how parts get to where they are added.
    """

    def __init__(self, hidden: Tensor, transfer: DeviceTransfer) -> None:
        self._dtype = hidden.dtype
        self._transfer = transfer
        self._total = torch.zeros(
            hidden.shape, dtype=torch.float32, device=transfer.device
        )  # [T, H]
        self._next_position = 0
        self._out_of_order: dict[int, tuple[Group, Tensor]] = {}  # came before one that precedes it

    def add(self, position: int, group: Group, output: Tensor) -> None:
        """Take one vector for each of the group's rows: [R, H]."""
        if position < self._next_position:  # it is in the sum already, and must not be there twice
            return
        if position > self._next_position:
            self._out_of_order[position] = (group, self._transfer.copy_to_device(output))
            return
        self._accumulate(group, self._transfer.to_device(output))
        self._next_position += 1
        while (queued := self._out_of_order.pop(self._next_position, None)) is not None:
            self._accumulate(*queued)
            self._next_position += 1

    def result(self) -> Tensor:
        """Return [T, H] in the batch's dtype."""
        for position in sorted(self._out_of_order):
            self._accumulate(*self._out_of_order.pop(position))
        return self._total.to(self._dtype)

    def _accumulate(self, group: Group, output: Tensor) -> None:
        if len(group.rows) == len(self._total):
            self._total += output
        else:
            rows = self._transfer.to_device(torch.from_numpy(group.rows))  # [R]
            self._total.index_add_(0, rows, output.float())


class PairReducer:
    """Puts each pair's output at its place and adds a token's experts in the gate's order.

    Args:
        hidden: the batch, [T, H], anywhere: its shape and dtype are those of the sum.
        top_k: slots k of each token.
        way: how outputs get to where they are added.
    """

    def __init__(self, hidden: Tensor, top_k: int, transfer: DeviceTransfer) -> None:
        self._dtype = hidden.dtype
        self._transfer = transfer
        n_rows, hidden_size = hidden.shape
        self._shape = (n_rows, top_k, hidden_size)
        self._pair_outputs = torch.zeros(n_rows * top_k, hidden_size, device=transfer.device)
        # [T * k, H] float32

    def add(self, position: int, group: Group, output: Tensor) -> None:
        """Take one vector for each of the group's pairs: [P, H]."""
        slots = self._transfer.to_device(torch.from_numpy(group.pair_slot))  # [P]
        self._pair_outputs[slots] = self._transfer.to_device(output).float()

    def result(self) -> Tensor:
        """Return [T, H] in the batch's dtype."""
        pairs = self._pair_outputs.view(self._shape)  # [T, k, H]
        total = pairs[:, 0].clone()  # [T, H]
        for slot in range(1, self._shape[1]):  # not sum(): its order may depend on T
            total += pairs[:, slot]
        return total.to(self._dtype)


def new_reducer(
    hidden: Tensor, *, mode: OutputMode, top_k: int, transfer: DeviceTransfer | None = None
) -> Reducer:
    """Return the sum that fits `mode` for a batch `hidden` [T, H]; on the host without a way."""
    transfer = transfer or HostTransfer()
    if mode is OutputMode.UNREDUCED:
        return PairReducer(hidden, top_k, transfer)
    return PartialSumReducer(hidden, transfer)


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
        mode: OutputMode,
        top_k: int,
        transfer: DeviceTransfer | None = None,
    ) -> None:
        self.groups = groups
        self._hidden = hidden
        self._layer = layer
        self._mode = mode
        self._dtype = WIRE_DTYPES[hidden.dtype]
        self._row_bytes = hidden.view(torch.uint8).numpy()  # [T, H * itemsize]
        self._reducer = new_reducer(hidden, mode=mode, top_k=top_k, transfer=transfer)

    @property
    def n_rows(self) -> int:
        """Tokens T of the batch."""
        return len(self._row_bytes)

    def request_frame(self, position: int) -> Sequence[Buffer]:
        """Return the request frame of the call at `position`."""
        group = self.groups[position]
        return encode_request(
            self._gather_rows(group),
            dtype=self._dtype,
            mode=self._mode,
            layer=self._layer,
            hidden_size=self._hidden.shape[1],
            n_rows=len(group.rows),
            pair_row=group.pair_row,
            pair_expert=group.pair_expert,
            pair_weight=group.pair_weight,
        )

    def add_response(self, position: int, frame: memoryview) -> None:
        """Take the response frame of the call at `position`; raises CallError if it is bad."""
        try:
            body = decode_response(frame, self._request_header(self.groups[position]))
        except WireError as error:
            raise CallError(f"bad response frame: {error}") from error
        output = torch.frombuffer(body, dtype=self._hidden.dtype)  # the sum copies what it keeps
        output = output.view(-1, self._hidden.shape[1])  # [T, H], or [P, H] unreduced
        if not _is_finite(output) and _is_finite(self._hidden):
            raise CallError("bad response frame: got non-finite values")
        self._reducer.add(position, self.groups[position], output)

    def compute_locally(
        self, position: int, functions: LocalFunctions | ColocatedFunctions, spec: FunctionSpec
    ) -> None:
        """Compute the call at `position` in this process."""
        group = self.groups[position]
        rows = memoryview(bytearray(self._gather_rows(group)))
        request = ExpertRequest(
            self._request_header(group), group.pair_row, group.pair_expert, group.pair_weight, rows
        )
        self._reducer.add(position, group, functions.compute(spec, request))

    def result(self) -> Tensor:
        """Return the sum of all parts where they are added, [T, H]."""
        return self._reducer.result()

    def _gather_rows(self, group: Group) -> Buffer:
        is_all_rows = len(group.rows) == len(self._row_bytes)
        selected = self._row_bytes if is_all_rows else np.take(self._row_bytes, group.rows, axis=0)
        return selected.data.cast("B")

    def _request_header(self, group: Group) -> FrameHeader:
        return FrameHeader(
            FrameKind.REQUEST, self._dtype, self._mode, self._layer,
            len(group.rows), len(group.pair_row), self._hidden.shape[1],
        )  # fmt: skip


def _is_finite(values: Tensor) -> bool:
    # Their sum first: it takes a fiftieth of the time, and is finite if all of them are, mostly.
    total = values.sum(dtype=torch.float32)
    return bool(total.isfinite()) or bool(values.isfinite().all())
