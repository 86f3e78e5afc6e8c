"""The lean kernel on a device: all of a frame's experts in one product each, over the block's copy.

`torch.nn.functional.grouped_mm` multiplies the rows of each expert with its weights. Sums are added
slot by slot in float32, experts ascending, without atomics: the same frame gives the same bits.
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
from faasmoe_expert.functions.transfer import to_device, to_host
from faasmoe_expert.functions.weights import LayerWeights, StackedBlock

GROUPED_MM_ALIGNMENT_BYTES = 16  # of every row, or grouped_mm refuses it
MIN_COMPUTE_CAPABILITY = (8, 0)  # of a CUDA device


def supports_grouped_mm(weights: LayerWeights, device: torch.device) -> bool:
    """Tell whether the block's products can be grouped: rows are aligned, the device can do it."""
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
    """A frame's pairs sorted by expert, on the host.

    Attributes:
        row: row of each pair, int32 [P].
        expert: position of its expert in the block, int32 [P].
        ends: where each expert's pairs end, int32 [E].
        slots: by row the places of its pairs, experts ascending, int32 [T, K]; P for none.
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
        """Sort a frame's pairs.

        Args:
            pairs: as they came, on the host.
            position: position in the block of each global expert index.
            n_rows: rows T of the frame.
            n_experts: experts E of the block.
        """
        local = position[pairs.expert]
        order = np.argsort(local, kind="stable")
        row, expert = pairs.row[order], local[order]
        counts = np.bincount(expert, minlength=n_experts)
        return cls(
            row,
            expert,
            np.cumsum(counts).astype(np.int32),
            _row_slots(row, n_rows),
            pairs.weight.numpy()[order],
        )

    def pack(self) -> NDArray[np.int32]:
        """Return all of it as one array, so that it is copied once."""
        weight = self.weight.view(np.int32)
        parts = (self.row, self.expert, self.ends, self.slots.reshape(-1), weight)
        return np.concatenate(parts)


def _row_slots(row: NDArray[np.int32], n_rows: int) -> NDArray[np.int32]:
    """Return [T, K]: the positions in `row` [P] of each row, ascending; P where there are fewer."""
    n_each = np.bincount(row, minlength=n_rows)
    slots = np.full((n_rows, max(1, n_each.max(initial=0))), len(row), dtype=np.int32)
    by_row = np.argsort(row, kind="stable")
    sorted_row = row[by_row]
    starts = np.cumsum(n_each) - n_each
    slots[sorted_row, np.arange(len(row)) - starts[sorted_row]] = by_row
    return slots


class GroupedKernel:
    """Computes frames from the host over a block's experts on a device."""

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
        """Return each pair's weighted output, [P, H]; tile by tile, see `run_gated`."""
        device_pairs = RoutedPairs(pairs.row, pairs.expert, to_device(pairs.weight, self._device))
        return to_host(
            gated_per_pair(self._spec, self._stacks, to_device(hidden, self._device), device_pairs)
        )

    def compute_reduced(self, hidden: Tensor, pairs: RoutedPairs) -> Tensor:
        """Return the weighted sum of each row's experts, [T, H]."""
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
        return to_host(total.to(hidden.dtype))

    def _sorted_pairs_to_device(self, sorted_pairs: SortedPairs) -> tuple[Tensor, ...]:
        packed = to_device(torch.from_numpy(sorted_pairs.pack()), self._device)
        n_pairs, n_slots = len(sorted_pairs.row), sorted_pairs.slots.size
        sizes = [n_pairs, n_pairs, self._n_experts, n_slots, n_pairs]
        row, expert, ends, slots, weight = torch.split(packed, sizes)
        return row, expert, ends, slots.view(sorted_pairs.slots.shape), weight.view(torch.float32)

    def _mlp(self, rows: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
        """Return the experts' outputs for rows [P, H] that are sorted by expert, [P, H]."""
        first = "up_proj" if self._spec.name == "plain" else "gate_up_proj"
        inner = apply_activation(self._spec, self._project(first, rows, expert, ends))  # [P, I]
        return self._project("down_proj", inner, expert, ends)

    def _project(self, name: str, rows: Tensor, expert: Tensor, ends: Tensor) -> Tensor:
        weight = self._stacks[name].tensor  # [E, out, in], or [E, in, out] if transposed
        product = F.grouped_mm(
            rows, weight if self._spec.transposed else weight.transpose(-2, -1), offs=ends
        )  # [P, out]
        if self._spec.bias:
            product += self._stacks[f"{name}_bias"].tensor[expert]
        return product
