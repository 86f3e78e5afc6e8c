"""One layer's calls for one batch: group token-expert pairs, encode requests, reduce responses.

Knows frames and tensors; knows nothing of addresses, connections or retries. Each output is
reduced as soon as those before it are, while other calls are still in flight, and in an order that
does not depend on arrival: results are deterministic. With a model on a GPU the reduction runs
there, since adding three outputs of 64 rows takes the host a quarter of a millisecond, a large
part of a layer's time (docs/performance-log.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
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
from faasmoe_router.dispatch.transport import CallError

WIRE_DTYPES = {
    torch.bfloat16: Dtype.BFLOAT16,
    torch.float16: Dtype.FLOAT16,
    torch.float32: Dtype.FLOAT32,
}


class FunctionComputer(Protocol):
    """Computes functions in this process."""

    def compute(self, spec: FunctionSpec, request: ExpertRequest) -> Tensor:
        """Return the output of function `spec`: float32 [R, H], or [P, H] unreduced."""


class LayerBatch:
    """A batch at one layer; calls are identified by their position in `groups`.

    Args:
        hidden: [T, H] on the CPU, contiguous, in the dtype of the frames.
        groups: what each call carries.
        layer: index of the MoE layer.
        mode: reduced or unreduced.
        top_k: slots k of each token.
        output_dtype: dtype of the result.
        transfer: moves outputs to the device that reduces them; None reduces on the host.
    """

    def __init__(
        self,
        hidden: Tensor,
        groups: Sequence[Group],
        *,
        layer: int,
        mode: OutputMode,
        top_k: int,
        output_dtype: torch.dtype,
        transfer: DeviceTransfer | None = None,
    ) -> None:
        self.groups = groups
        self._hidden = hidden
        self._layer = layer
        self._mode = mode
        self._dtype = WIRE_DTYPES[hidden.dtype]
        self._row_bytes = hidden.view(torch.uint8).numpy()  # [T, H * itemsize]
        self._reducer = new_reducer(
            hidden.shape, output_dtype, mode=mode, top_k=top_k, transfer=transfer
        )

    @property
    def n_rows(self) -> int:
        """Number of tokens T in the batch."""
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
        """Add the response frame of the call at `position`.

        Raises:
            CallError: the frame is malformed, or contains non-finite values although the batch
                does not.
        """
        try:
            body = decode_response(frame, self._request_header(self.groups[position]))
        except WireError as error:
            raise CallError(f"bad response frame: {error}") from error
        is_reduced = self._mode is OutputMode.REDUCED
        dtype = torch.float32 if is_reduced else self._hidden.dtype
        output = torch.frombuffer(body, dtype=dtype)  # copied by the reducer
        output = output.view(-1, self._hidden.shape[1])  # [R, H], or [P, H] unreduced
        if not _is_finite(output) and _is_finite(self._hidden):
            raise CallError("bad response frame: got non-finite values")
        self._reducer.add(position, self.groups[position], output)

    def compute_locally(
        self, position: int, functions: FunctionComputer, spec: FunctionSpec
    ) -> None:
        """Compute the call at `position` in this process instead of calling a sandbox."""
        group = self.groups[position]
        rows = memoryview(bytearray(self._gather_rows(group)))
        request = ExpertRequest(
            self._request_header(group), group.pair_row, group.pair_expert, group.pair_weight, rows
        )
        self._reducer.add(position, group, functions.compute(spec, request))

    def result(self) -> Tensor:
        """Return the combined output on the reducing device, [T, H] in the output dtype."""
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
    # The sum takes a fiftieth of the time, and is usually finite if all values are.
    total = values.sum(dtype=torch.float32)
    return bool(total.isfinite()) or bool(values.isfinite().all())


@dataclass(frozen=True, slots=True)
class Group:
    """The contents of one call: some rows, and the pairs that one function computes for them.

    Attributes:
        function_index: position of the function in the layer's list.
        rows: rows of the batch, int64 [R], ascending.
        pair_row: position in `rows` of each pair, int32 [P], ascending.
        pair_expert: global expert index of each pair, int32 [P].
        pair_weight: routing weight of each pair, float32 [P].
        pair_slot: index of each pair in the flattened routing [T * k], int64 [P].
    """

    function_index: int
    rows: NDArray[np.int64]
    pair_row: NDArray[np.int32]
    pair_expert: NDArray[np.int32]
    pair_weight: NDArray[np.float32]
    pair_slot: NDArray[np.int64]


def group_pairs(
    top_k_index: NDArray[np.int64],
    top_k_weight: NDArray[np.float32],
    function_of: NDArray[np.int32],
    *,
    max_rows: int,
) -> list[Group]:
    """Group a batch's token-expert pairs by function, each group of at most `max_rows` rows.

    Groups are in ascending order of their function. Pairs with an expert index outside 0..E-1 are
    skipped: some model families mark padding and zero-computation slots that way.

    Args:
        top_k_index: expert of each slot, [T, k].
        top_k_weight: weight of each slot, [T, k].
        function_of: position of each expert's function in the layer's list, int32 [E].
        max_rows: number of rows that fit into one frame, at least 1.
    """
    k = top_k_index.shape[1]
    expert = top_k_index.reshape(-1)  # [T * k]
    slot = np.flatnonzero((expert >= 0) & (expert < len(function_of)))  # [P]
    function = function_of[expert[slot]]  # [P]
    order = np.argsort(function, kind="stable")  # [P]
    slot, function = slot[order], function[order]
    weight = top_k_weight.reshape(-1)  # [T * k]
    groups: list[Group] = []
    for start, end in _runs(function):
        pairs = slot[start:end]
        rows, pair_row = _unique_rows(pairs // k)
        groups.extend(
            Group(
                int(function[start]),
                rows[row_start:row_end],
                (pair_row[pair_start:pair_end] - row_start).astype(np.int32),
                expert[pairs[pair_start:pair_end]].astype(np.int32),
                weight[pairs[pair_start:pair_end]].astype(np.float32, copy=False),
                pairs[pair_start:pair_end],
            )
            for row_start, row_end, pair_start, pair_end in _split_frames(
                pair_row, len(rows), max_rows
            )
        )
    return groups


def _runs(values: NDArray[np.int32]) -> Iterator[tuple[int, int]]:
    """Yield (start, end) of each run of equal values."""
    if len(values) == 0:
        return
    boundaries = [0, *(np.flatnonzero(values[1:] != values[:-1]) + 1).tolist(), len(values)]
    yield from itertools.pairwise(boundaries)


def _unique_rows(rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the distinct rows of an ascending list and each entry's position among them."""
    is_first = np.empty(len(rows), dtype=np.bool_)
    is_first[0], is_first[1:] = True, rows[1:] != rows[:-1]
    return rows[is_first], np.cumsum(is_first) - 1


def _split_frames(
    pair_row: NDArray[np.int64], n_rows: int, max_rows: int
) -> Iterator[tuple[int, int, int, int]]:
    """Yield (first row, end row, first pair, end pair) of each frame."""
    for row_start in range(0, n_rows, max_rows):
        row_end = min(row_start + max_rows, n_rows)
        pair_start, pair_end = np.searchsorted(pair_row, (row_start, row_end)).tolist()
        yield row_start, row_end, pair_start, pair_end


class Reducer(Protocol):
    """Reduces the outputs of one layer's calls."""

    def add(self, position: int, group: Group, output: Tensor) -> None:
        """Add the output of the call at `position`; copies what it keeps."""

    def result(self) -> Tensor:
        """Return the sum of the outputs added so far, [T, H] in the result's dtype."""


def new_reducer(
    shape: torch.Size,
    dtype: torch.dtype,
    *,
    mode: OutputMode,
    top_k: int,
    transfer: DeviceTransfer | None = None,
) -> Reducer:
    """Return the reducer of `mode`.

    Args:
        shape: shape of the result, [T, H].
        dtype: dtype of the result, to which the float32 sum is rounded once.
        mode: reduced or unreduced.
        top_k: slots k of each token.
        transfer: moves outputs to the device that adds them; None adds them on the host.
    """
    transfer = transfer or HostTransfer()
    if mode is OutputMode.UNREDUCED:
        return PairReducer(shape, dtype, top_k, transfer)
    return PartialSumReducer(shape, dtype, transfer)


class PartialSumReducer:
    """Adds partial sums in float32, in the order of the calls.

    Args:
        shape: shape of the result, [T, H].
        dtype: dtype of the result.
        transfer: moves outputs to the device that adds them.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, transfer: DeviceTransfer) -> None:
        self._dtype = dtype
        self._transfer = transfer
        self._total = torch.zeros(shape, dtype=torch.float32, device=transfer.device)  # [T, H]
        self._next_position = 0
        self._out_of_order: dict[int, tuple[Group, Tensor]] = {}  # waiting for earlier positions

    def add(self, position: int, group: Group, output: Tensor) -> None:
        """Add one vector for each of the group's rows, [R, H]; ignores duplicates."""
        if position < self._next_position:
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
        """Return the sum of the outputs added so far, [T, H] in the result's dtype."""
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
    """Stores each pair's output in its slot and adds a token's slots in the gate's order.

    Args:
        shape: shape of the result, [T, H].
        dtype: dtype of the result.
        top_k: slots k of each token.
        transfer: moves outputs to the device that adds them.
    """

    def __init__(
        self, shape: torch.Size, dtype: torch.dtype, top_k: int, transfer: DeviceTransfer
    ) -> None:
        self._dtype = dtype
        self._transfer = transfer
        n_rows, hidden_size = shape
        self._shape = (n_rows, top_k, hidden_size)
        self._pair_outputs = torch.zeros(
            n_rows * top_k, hidden_size, device=transfer.device
        )  # [T * k, H], float32

    def add(self, position: int, group: Group, output: Tensor) -> None:
        """Store one vector for each of the group's pairs, [P, H]."""
        slots = self._transfer.to_device(torch.from_numpy(group.pair_slot))  # [P]
        self._pair_outputs[slots] = self._transfer.to_device(output).float()

    def result(self) -> Tensor:
        """Return the sum of the outputs added so far, [T, H] in the result's dtype."""
        pairs = self._pair_outputs.view(self._shape)  # [T, k, H]
        total = pairs[:, 0].clone()  # [T, H]
        for slot in range(1, self._shape[1]):  # not sum(), whose order may depend on T
            total += pairs[:, slot]
        return total.to(self._dtype)


class DeviceTransfer(Protocol):
    """Moves function outputs from host memory to the device that reduces them."""

    @property
    def device(self) -> torch.device:
        """The device that reduces outputs."""

    def to_device(self, host: Tensor) -> Tensor:
        """Return a host tensor on the device; it may alias `host`, so use it immediately."""

    def copy_to_device(self, host: Tensor) -> Tensor:
        """Return a copy of a host tensor on the device; it stays valid when `host` changes."""


class HostTransfer:
    """The transfer of a router whose model is on the host."""

    device = torch.device("cpu")

    def to_device(self, host: Tensor) -> Tensor:
        """Return `host` itself."""
        return host

    def copy_to_device(self, host: Tensor) -> Tensor:
        """Return a copy of `host`."""
        return host.clone()
