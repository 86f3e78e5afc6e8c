"""The (row, expert) pairs of a frame, and the ways to walk over them.

The lean kernel: the common gated expert, without importing transformers.

`act(x @ gate) * (x @ up) @ down`, the form of Mixtral, Qwen, OLMoE, DeepSeek and most others. Which
layers it is right for is decided when a store is prepared, by comparing it with the family's own
module; this file only computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

TILE_ROWS = 8  # rows of every product in unreduced mode: equal shapes give equal bits


@dataclass(frozen=True, slots=True)
class PaddedGroup:
    """Pairs of some experts, laid out one expert after the other for products into one tensor.

    Attributes:
        positions: of its pairs, by expert, ascending, int64 [n].
        places: the row of the layout that each of them has, int64 [n].
        spans: (expert, first row, row after the last) of each expert in the layout; what is not a
            pair's is padding.
        n_rows: rows of the layout.
    """

    positions: NDArray[np.int64]
    padded_index: NDArray[np.int64]
    spans: tuple[tuple[int, int, int], ...]
    n_rows: int

    @classmethod
    def from_experts(cls, experts: Sequence[tuple[int, NDArray[np.int64], int]]) -> PaddedGroup:
        """Lay out groups of (expert, positions, rows with padding)."""
        padded_index, spans, start = [], [], 0
        for expert, positions, n_rows in experts:
            padded_index.append(np.arange(start, start + len(positions)))
            spans.append((expert, start, start + n_rows))
            start += n_rows
        pair_index = np.concatenate([positions for _, positions, _ in experts])
        return cls(pair_index, np.concatenate(padded_index), tuple(spans), start)


@dataclass(frozen=True, slots=True)
class RoutedPairs:
    """What is to be computed for the rows of a frame.

    Attributes:
        row: row of each pair, int32 [P].
        expert: global expert index of each pair, int32 [P].
        weight: routing weight of each pair, float32 [P], on the device of the rows.
    """

    row: NDArray[np.int32]
    expert: NDArray[np.int32]
    weight: Tensor

    def __len__(self) -> int:
        """Return P."""
        return len(self.row)

    def by_expert(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield each expert, ascending, with the positions of its pairs, ascending."""
        order = np.argsort(self.expert, kind="stable")
        grouped = self.expert[order]
        cuts = np.flatnonzero(grouped[1:] != grouped[:-1]) + 1
        for positions in np.split(order, cuts):
            yield int(self.expert[positions[0]]), positions

    def padded_groups(
        self, pad_row_count: Callable[[int], int], *, max_rows: int
    ) -> Iterator[PaddedGroup]:
        """Yield all pairs in runs of whole experts, ascending.

        Args:
            pad: how many rows an expert gets for so many pairs.
            max_rows: of a run; an expert that has more is a run of its own.
        """
        experts: list[tuple[int, NDArray[np.int64], int]] = []
        total = 0
        for expert, positions in self.by_expert():
            n_rows = pad_row_count(len(positions))
            if experts and total + n_rows > max_rows:
                yield PaddedGroup.from_experts(experts)
                experts, total = [], 0
            experts.append((expert, positions, n_rows))
            total += n_rows
        yield PaddedGroup.from_experts(experts)

    def tiles(self, hidden: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield an expert, the positions of up to 8 of its pairs [n], and their rows [8, H].

        Args:
            hidden: [T, H]; a tile that is not full ends in rows of zeros.
        """
        for expert, positions in self.by_expert():
            for start in range(0, len(positions), TILE_ROWS):
                tile = positions[start : start + TILE_ROWS]
                rows = hidden.new_zeros(TILE_ROWS, hidden.shape[1])  # [8, H]
                rows[: len(tile)] = hidden[index_tensor(self.row[tile], hidden.device)]
                yield expert, index_tensor(tile, hidden.device), rows


def index_tensor(values: NDArray[Any], device: torch.device) -> Tensor:
    """Return int64 indices on `device`."""
    return torch.from_numpy(values.astype(np.int64, copy=False)).to(device)


PADDED_ROW_COUNTS = (
    1,
    4,
    8,
    16,
    32,
    64,
)  # of products in reduced mode; above, multiples of the last
MAX_GROUP_ROWS = 256  # products of experts with fewer rows go into one tensor; bounds its size

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
}


class StackedParameter(Protocol):
    """Parameters of several experts, by expert index: a stacked tensor or a mapping."""

    def __getitem__(self, expert: int, /) -> Tensor:
        """Return one expert's parameter."""


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """How the lean kernel computes an expert of one layer.

    Attributes:
        name: "gated" (gate_up_proj, down_proj) or "plain" (up_proj, down_proj, no gate).
        activation: a key of ACTIVATIONS, named as in transformers' ACT2FN.
        transposed: weights are [in, out] rather than [out, in].
        interleaved: gate and up alternate rather than follow each other.
        bias: the projections have biases.
    """

    name: str
    activation: str
    transposed: bool
    interleaved: bool
    bias: bool

    def __post_init__(self) -> None:
        """Refuse what this kernel cannot compute."""
        if self.name not in ("gated", "plain"):
            raise ValueError(f"kernel.name: got {self.name!r}, expected gated or plain")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"kernel.activation: got {self.activation!r}, expected one of {sorted(ACTIVATIONS)}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object kept in a store's manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> KernelSpec:
        """Read the JSON object kept in a store's manifest."""
        return cls(**value)


def gated_per_pair(
    spec: KernelSpec, weights: Mapping[str, StackedParameter], hidden: Tensor, pairs: RoutedPairs
) -> Tensor:
    """Return each pair's weighted output, bit-identical whatever else is in the call.

    Args:
        spec: the kernel's form.
        weights: parameters by name, then by expert.
        hidden: [T, H].
        pairs: which rows are for which experts, [P].

    Returns:
        [P, H] in `hidden`'s dtype.
    """
    out = hidden.new_empty(len(pairs), hidden.shape[1])  # [P, H]
    for expert, index, rows in pairs.tiles(hidden):
        result = expert_mlp(spec, weights, expert, rows)[: len(index)]  # [n, H]
        out[index] = (result.float() * pairs.weight[index, None]).to(out.dtype)
    return out


def gated_reduced(
    spec: KernelSpec, weights: Mapping[str, StackedParameter], hidden: Tensor, pairs: RoutedPairs
) -> Tensor:
    """Return the weighted sum of each row's experts, [T, H] in `hidden`'s dtype.

    Sums in float32, in ascending order of experts. Arguments as in `run_gated`.
    """
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)  # [T, H]
    for group in pairs.padded_groups(pad_row_count, max_rows=MAX_GROUP_ROWS):
        index = index_tensor(pairs.row[group.positions], hidden.device)  # [n]
        scale = pairs.weight[index_tensor(group.positions, hidden.device), None]  # [n, 1]
        result = _group_mlp(spec, weights, group, hidden[index])  # [n, H]
        total.index_add_(0, index, result.float().mul_(scale))
    return total.to(hidden.dtype)


def pad_row_count(n_rows: int) -> int:
    """Return how many rows a product of `n_rows` is computed with.

    oneDNN generates and keeps kernels of 1 to 1.5 MB for every row count that it meets: 40 counts
    cost a sandbox 52 MB. Few counts cost little time, because a product of few rows is bound by
    reading the weights.
    """
    for size in PADDED_ROW_COUNTS:
        if n_rows <= size:
            return size
    return -(-n_rows // PADDED_ROW_COUNTS[-1]) * PADDED_ROW_COUNTS[-1]


def _group_mlp(
    spec: KernelSpec, weights: Mapping[str, StackedParameter], group: PaddedGroup, rows: Tensor
) -> Tensor:
    """Return the output of each pair of a run, not weighted, [n, H], from its row in `rows` [n, H].

    Products go into slices of one tensor for all experts, so that all else is done once for all of
    them: a tenth less time than expert by expert, with few rows each.
    """
    padded_index = None  # [n]
    if group.n_rows > len(rows):
        padded_index = index_tensor(group.padded_index, rows.device)
        rows = rows.new_zeros(group.n_rows, rows.shape[1]).index_copy_(
            0, padded_index, rows
        )  # [R, H]
    first = "up_proj" if spec.name == "plain" else "gate_up_proj"
    inner = apply_activation(spec, _group_project(spec, weights, first, group, rows))  # [R, I]
    result = _group_project(spec, weights, "down_proj", group, inner)  # [R, H]
    return result if padded_index is None else result[padded_index]


def _group_project(
    spec: KernelSpec,
    weights: Mapping[str, StackedParameter],
    name: str,
    group: PaddedGroup,
    x: Tensor,
) -> Tensor:
    """Return each expert's rows of `x` [R, in] times its own weight: [R, out]."""
    outputs = weights[name][group.spans[0][0]].shape[1 if spec.transposed else 0]
    product = x.new_empty(group.n_rows, outputs)  # [R, out]
    for expert, start, end in group.spans:
        weight = weights[name][expert]  # [out, in], or [in, out] if transposed
        bias = weights[f"{name}_bias"][expert] if spec.bias else None  # [out]
        matrix = weight if spec.transposed else weight.t()  # [in, out]
        out = product[start:end]  # [n, out]
        if bias is None:
            torch.mm(x[start:end], matrix, out=out)
        elif spec.transposed:
            torch.mm(x[start:end], matrix, out=out).add_(bias)
        else:
            torch.addmm(bias, x[start:end], matrix, out=out)
    return product


def expert_mlp(
    spec: KernelSpec, weights: Mapping[str, StackedParameter], expert: int, x: Tensor
) -> Tensor:
    """Return one expert's output for rows `x` [n, H], not weighted: [n, H]."""
    first = "up_proj" if spec.name == "plain" else "gate_up_proj"
    inner = apply_activation(spec, _project(spec, weights, first, expert, x))  # [n, I]
    return _project(spec, weights, "down_proj", expert, inner)  # [n, H]


def apply_activation(spec: KernelSpec, projected: Tensor) -> Tensor:
    """Return what the down projection takes, [n, I], of what the first gives: [n, 2I] if gated."""
    activation = ACTIVATIONS[spec.activation]
    if spec.name == "plain":
        return activation(projected)
    if spec.interleaved:
        gate, up = projected[:, ::2], projected[:, 1::2]  # [n, I] each
    else:
        gate, up = projected.chunk(2, dim=-1)  # [n, I] each
    return activation(gate) * up


def _project(
    spec: KernelSpec, weights: Mapping[str, StackedParameter], name: str, expert: int, x: Tensor
) -> Tensor:
    weight = weights[name][expert]  # [out, in], or [in, out] if transposed
    bias = weights[f"{name}_bias"][expert] if spec.bias else None  # [out]
    if not spec.transposed:
        return F.linear(x, weight, bias)
    product = x @ weight  # [n, out]
    return product if bias is None else product + bias
