"""The gated kernel on a device: one grouped matrix product per projection, for all experts at once.

`torch.nn.functional.grouped_mm` multiplies the rows of each expert by its weights. Outputs are
summed in float32, slot by slot with experts ascending and without atomics, so that the same frame
gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from faasmoe_expert.functions.kernels import (
    KernelSpec,
    RoutedPairs,
    apply_activation,
    gated_per_pair,
)
from faasmoe_expert.functions.stacks import StackedBlock
from faasmoe_expert.functions.transfer import to_device, to_host
from faasmoe_expert.functions.weights import LayerWeights

GROUPED_MM_ALIGNMENT_BYTES = 16  # required row alignment
MIN_COMPUTE_CAPABILITY = (8, 0)  # required CUDA compute capability


def supports_grouped_mm(weights: LayerWeights, device: torch.device) -> bool:
    """Return whether grouped_mm supports the device and the row alignment of the weights."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < MIN_COMPUTE_CAPABILITY:
        return False
    stacks = [stack.tensor for stack in weights.stacked.values() if isinstance(stack, StackedBlock)]
    projections = [tensor for tensor in stacks if tensor.dim() == 3]
    return all(
        size * tensor.itemsize % GROUPED_MM_ALIGNMENT_BYTES == 0
        for tensor in projections
        for size in tensor.shape[1:]
    )


@dataclass(frozen=True, slots=True)
class SortedPairs:
    """The pairs of a frame sorted by expert, on the host.

    Attributes:
        row: row of each pair, int32 [P].
        expert: position of each pair's expert in the block, int32 [P].
        ends: end offset of each expert's pairs, int32 [E].
        slots: indices of each row's pairs, experts ascending, padded with P, int32 [T, K].
        weight: routing weight of each pair, float32 [P].
    """

    row: NDArray[np.int32]
    expert: NDArray[np.int32]
    ends: NDArray[np.int32]
    slots: NDArray[np.int32]
    weight: NDArray[np.float32]

    @classmethod
    def from_pairs(
        cls, pairs: RoutedPairs, position: NDArray[np.int32], *, n_rows: int, n_experts: int
    ) -> SortedPairs:
        """Sort the pairs of a frame.

        Args:
            pairs: pairs in frame order, on the host.
            position: position in the block by global expert index, int32.
            n_rows: number of rows T of the frame.
            n_experts: number of experts E of the block.
        """
        local = position[pairs.expert]  # [P]
        order = np.argsort(local, kind="stable")  # [P]
        row, expert = pairs.row[order], local[order]  # [P] each
        counts = np.bincount(expert, minlength=n_experts)  # [E]
        return cls(
            row,
            expert,
            np.cumsum(counts).astype(np.int32),
            _row_slots(row, n_rows),
            pairs.weight.numpy()[order],
        )

    def pack(self) -> NDArray[np.int32]:
        """Return all arrays as one, int32 [3P + E + T*K], so that one copy moves them."""
        weight = self.weight.view(np.int32)
        parts = (self.row, self.expert, self.ends, self.slots.reshape(-1), weight)
        return np.concatenate(parts)


def _row_slots(row: NDArray[np.int32], n_rows: int) -> NDArray[np.int32]:
    """Return the indices into `row` [P] of each row, ascending, padded with P: int32 [T, K]."""
    n_each = np.bincount(row, minlength=n_rows)
    slots = np.full((n_rows, max(1, n_each.max(initial=0))), len(row), dtype=np.int32)
    by_row = np.argsort(row, kind="stable")
    sorted_row = row[by_row]
    starts = np.cumsum(n_each) - n_each
    slots[sorted_row, np.arange(len(row)) - starts[sorted_row]] = by_row
    return slots


class GroupedKernel:
    """Computes frames from the host with the experts of one layer's block on a device.

    Args:
        spec: form of the kernel.
        weights: the block's parameters on the device.
        experts: global expert indices of the block, ascending.
        device: the device.
    """

    name = "grouped"

    def __init__(
        self,
        spec: KernelSpec,
        weights: LayerWeights,
        experts: tuple[int, ...],
        device: torch.device,
    ) -> None:
        self._spec = spec
        self._stacks = {n: s for n, s in weights.stacked.items() if isinstance(s, StackedBlock)}
        self._device = device
        self._n_experts = len(experts)
        self._position = np.zeros(experts[-1] + 1, dtype=np.int32)
        self._position[list(experts)] = np.arange(len(experts))

    def compute_per_pair(self, hidden: Tensor, pairs: RoutedPairs) -> Tensor:
        """Return the weighted output of each pair, [P, H]; tile by tile, see `gated_per_pair`."""
        device_pairs = RoutedPairs(pairs.row, pairs.expert, to_device(pairs.weight, self._device))
        return to_host(
            gated_per_pair(self._spec, self._stacks, to_device(hidden, self._device), device_pairs)
        )

    def compute_reduced(self, hidden: Tensor, pairs: RoutedPairs) -> Tensor:
        """Return the weighted sum over each row's experts, float32 [T, H]."""
        sorted_pairs = SortedPairs.from_pairs(
            pairs, self._position, n_rows=len(hidden), n_experts=self._n_experts
        )
        row, expert, ends, slots, weight = self._sorted_pairs_to_device(sorted_pairs)
        rows = to_device(hidden, self._device)[row]  # [P, H]
        outputs = self._mlp(rows, expert, ends)  # [P, H]
        padded = torch.zeros(
            len(outputs) + 1, outputs.shape[1], device=outputs.device
        )  # [P + 1, H] float32
        torch.mul(outputs, weight[:, None], out=padded[:-1])
        total = padded[slots[:, 0]]  # [T, H]
        for slot in range(1, slots.shape[1]):
            total += padded[slots[:, slot]]
        return to_host(total)

    def _sorted_pairs_to_device(self, sorted_pairs: SortedPairs) -> tuple[Tensor, ...]:
        packed = to_device(torch.from_numpy(sorted_pairs.pack()), self._device)
        n_pairs, n_slots = len(sorted_pairs.row), sorted_pairs.slots.size
        sizes = [n_pairs, n_pairs, self._n_experts, n_slots, n_pairs]
        row, expert, ends, slots, weight = torch.split(packed, sizes)
        return row, expert, ends, slots.view(sorted_pairs.slots.shape), weight.view(torch.float32)

    def _mlp(self, rows: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
        """Return expert outputs [P, H] for `rows` [P, H], which are sorted by expert."""
        first = "up_proj" if self._spec.name == "plain" else "gate_up_proj"
        inner = apply_activation(self._spec, self._project(first, rows, expert, ends))  # [P, I]
        return self._project("down_proj", inner, expert, ends)

    def _project(self, name: str, rows: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
        weight = self._stacks[name].tensor  # [E, out, in], or [E, in, out] if transposed
        product = F.grouped_mm(
            rows, weight if self._spec.transposed else weight.transpose(-2, -1), offs=ends
        )  # [P, out]
        if self._spec.bias:
            product += self._stacks[f"{name}_bias"].tensor[expert]  # [P, out]
        return product
