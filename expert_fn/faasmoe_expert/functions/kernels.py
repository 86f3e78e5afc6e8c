"""The gated kernel: computes common expert MLPs without importing transformers.

`act(x @ gate) * (x @ up) @ down` is the form of Mixtral, Qwen, OLMoE, DeepSeek and most others; a
variant without gate is supported too. Preparation decides which layers it is correct for, by
comparing it with the family's own module; this module only computes.

`gated_per_pair` gives bit-identical outputs per (row, expert) pair, `gated_reduced` sums per row.
Both need few distinct matrix shapes: the former multiplies tiles of 8 rows, the latter pads.
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
PADDED_ROW_COUNTS = (1, 4, 8, 16, 32, 64)  # reduced mode; larger counts: multiples of the last
MAX_GROUP_ROWS = 256  # reduced mode: experts share one tensor of at most this many rows

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
CLAMPED_SWIGLU = "clamped_swiglu"
"""GPT-OSS's: (up + 1) * gate * sigmoid(alpha * gate), with gate and up clamped at a limit. Unlike
ACTIVATIONS it is a function of both."""


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """Parameters of the gated kernel for one layer.

    Attributes:
        name: "gated" (gate_up_proj, down_proj) or "plain" (up_proj, down_proj, no gate).
        activation: a key of ACTIVATIONS, named as in transformers' ACT2FN, or CLAMPED_SWIGLU.
        transposed: whether weights are [in, out] instead of [out, in].
        interleaved: whether gate and up columns alternate instead of being concatenated.
        bias: whether the projections have biases.
        alpha: factor of CLAMPED_SWIGLU.
        limit: bound of CLAMPED_SWIGLU.
    """

    name: str
    activation: str
    transposed: bool
    interleaved: bool
    bias: bool
    alpha: float = 0.0
    limit: float = 0.0

    def __post_init__(self) -> None:
        """Raise ValueError for an unsupported name or activation, or without its parameters."""
        if self.name not in ("gated", "plain"):
            raise ValueError(f"kernel.name: got {self.name!r}, expected gated or plain")
        allowed = sorted((*ACTIVATIONS, *[CLAMPED_SWIGLU] * (self.name == "gated")))
        if self.activation not in allowed:
            raise ValueError(
                f"kernel.activation: got {self.activation!r}, expected one of {allowed}"
            )
        if self.activation == CLAMPED_SWIGLU and not (self.alpha > 0 and self.limit > 0):
            raise ValueError(
                f"kernel: got alpha {self.alpha} and limit {self.limit}, expected positive numbers "
                f"for {CLAMPED_SWIGLU}"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object for the store's manifest."""
        value = asdict(self)
        if self.activation != CLAMPED_SWIGLU:
            del value["alpha"], value["limit"]
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> KernelSpec:
        """Parse the JSON object from a store's manifest; raises TypeError or ValueError."""
        return cls(**value)


class StackedParameter(Protocol):
    """One parameter of several experts: a stacked tensor, or a mapping by expert index."""

    def __getitem__(self, expert: int, /) -> Tensor:
        """Return the parameter of one global expert index."""


@dataclass(frozen=True, slots=True)
class RoutedPairs:
    """The (row, expert) pairs of a frame.

    Attributes:
        row: row of each pair, int32 [P].
        expert: global expert index of each pair, int32 [P].
        weight: routing weight of each pair, float32 [P], on the device of the rows.
    """

    row: NDArray[np.int32]
    expert: NDArray[np.int32]
    weight: Tensor

    def __len__(self) -> int:
        """Return the number of pairs P."""
        return len(self.row)

    def by_expert(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Yield each expert, ascending, with the indices of its pairs, int64 [n], ascending."""
        order = np.argsort(self.expert, kind="stable")
        grouped = self.expert[order]
        cuts = np.flatnonzero(grouped[1:] != grouped[:-1]) + 1
        for positions in np.split(order, cuts):
            yield int(self.expert[positions[0]]), positions

    def padded_groups(
        self, pad_row_count: Callable[[int], int], *, max_rows: int
    ) -> Iterator[PaddedGroup]:
        """Yield all pairs in groups of whole experts, ascending.

        Args:
            pad_row_count: maps the number of an expert's pairs to its number of padded rows.
            max_rows: maximum padded rows of a group; a larger expert forms a group of its own.
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
        """Yield (expert, indices of up to 8 of its pairs [n], their hidden states [8, H]).

        Args:
            hidden: hidden states of the frame, [T, H]; incomplete tiles are padded with zeros.
        """
        for expert, positions in self.by_expert():
            for start in range(0, len(positions), TILE_ROWS):
                tile = positions[start : start + TILE_ROWS]
                rows = hidden.new_zeros(TILE_ROWS, hidden.shape[1])  # [8, H]
                rows[: len(tile)] = hidden[index_tensor(self.row[tile], hidden.device)]
                yield expert, index_tensor(tile, hidden.device), rows


@dataclass(frozen=True, slots=True)
class PaddedGroup:
    """Pairs of some experts in one padded tensor of R rows, expert after expert.

    Attributes:
        positions: indices of the group's pairs, by expert, then ascending, int64 [n].
        padded_index: row of each of these pairs in the padded tensor, int64 [n].
        spans: (expert, first row, end row) of each expert, padding included.
        n_rows: number of rows R.
    """

    positions: NDArray[np.int64]
    padded_index: NDArray[np.int64]
    spans: tuple[tuple[int, int, int], ...]
    n_rows: int

    @classmethod
    def from_experts(cls, experts: Sequence[tuple[int, NDArray[np.int64], int]]) -> PaddedGroup:
        """Build a group of (expert, indices of its pairs, number of padded rows) entries."""
        padded_index, spans, start = [], [], 0
        for expert, positions, n_rows in experts:
            padded_index.append(np.arange(start, start + len(positions)))
            spans.append((expert, start, start + n_rows))
            start += n_rows
        pair_index = np.concatenate([positions for _, positions, _ in experts])
        return cls(pair_index, np.concatenate(padded_index), tuple(spans), start)


def gated_per_pair(
    spec: KernelSpec, weights: Mapping[str, StackedParameter], hidden: Tensor, pairs: RoutedPairs
) -> Tensor:
    """Return the weighted output of each pair, bit-identical regardless of the other pairs.

    Args:
        spec: form of the kernel.
        weights: parameters by name, then by global expert index.
        hidden: hidden states, [T, H].
        pairs: the P pairs to compute.

    Returns:
        [P, H] in the dtype of `hidden`.
    """
    out = hidden.new_empty(len(pairs), hidden.shape[1])  # [P, H]
    for expert, index, rows in pairs.tiles(hidden):
        result = expert_mlp(spec, weights, expert, rows)[: len(index)]  # [n, H]
        out[index] = (result.float() * pairs.weight[index, None]).to(out.dtype)
    return out


def gated_reduced(
    spec: KernelSpec, weights: Mapping[str, StackedParameter], hidden: Tensor, pairs: RoutedPairs
) -> Tensor:
    """Return the weighted sum over each row's experts, float32 [T, H].

    Experts are added in ascending order. For the arguments see `gated_per_pair`.
    """
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)  # [T, H]
    for group in pairs.padded_groups(pad_row_count, max_rows=MAX_GROUP_ROWS):
        index = index_tensor(pairs.row[group.positions], hidden.device)  # [n]
        scale = pairs.weight[index_tensor(group.positions, hidden.device), None]  # [n, 1]
        result = _group_mlp(spec, weights, group, hidden[index])  # [n, H]
        total.index_add_(0, index, result.float().mul_(scale))
    return total


def pad_row_count(n_rows: int) -> int:
    """Return the number of rows that a product of `n_rows` rows is padded to.

    oneDNN generates and caches kernels of 1 to 1.5 MB for every row count: 40 counts cost a sandbox
    52 MB. Padding costs little time, because products of few rows are bound by reading the weights.
    """
    for size in PADDED_ROW_COUNTS:
        if n_rows <= size:
            return size
    return -(-n_rows // PADDED_ROW_COUNTS[-1]) * PADDED_ROW_COUNTS[-1]


def _group_mlp(
    spec: KernelSpec, weights: Mapping[str, StackedParameter], group: PaddedGroup, rows: Tensor
) -> Tensor:
    """Return the unweighted outputs [n, H] of a group's pairs for their hidden states [n, H].

    Products are written to slices of one tensor, so that everything else runs once for all experts:
    10% faster than expert by expert when each has few rows.
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
    """Return the product [R, out] of each expert's rows in `x` [R, in] and its weight."""
    product: Tensor | None = None
    for expert, start, end in group.spans:
        weight = weights[name][expert]  # [out, in], or [in, out] if transposed
        if product is None:
            outputs = weight.shape[1 if spec.transposed else 0]
            product = x.new_empty(group.n_rows, outputs)  # [R, out]
        bias = weights[f"{name}_bias"][expert] if spec.bias else None  # [out]
        matrix = weight if spec.transposed else weight.t()  # [in, out]
        out = product[start:end]  # [n, out]
        if bias is None:
            torch.mm(x[start:end], matrix, out=out)
        else:  # rounds once, unlike a product and a sum
            torch.addmm(bias, x[start:end], matrix, out=out)
    assert product is not None  # a group has at least one expert
    return product


def expert_mlp(
    spec: KernelSpec, weights: Mapping[str, StackedParameter], expert: int, x: Tensor
) -> Tensor:
    """Return the unweighted output [n, H] of one expert for rows `x` [n, H]."""
    first = "up_proj" if spec.name == "plain" else "gate_up_proj"
    inner = apply_activation(spec, _project(spec, weights, first, expert, x))  # [n, I]
    return _project(spec, weights, "down_proj", expert, inner)  # [n, H]


def apply_activation(spec: KernelSpec, projected: Tensor) -> Tensor:
    """Return the input of the down projection, [n, I], from [n, 2I] if gated, else [n, I]."""
    if spec.name == "plain":
        return ACTIVATIONS[spec.activation](projected)
    if spec.interleaved:
        gate, up = projected[:, ::2], projected[:, 1::2]  # [n, I] each
    else:
        gate, up = projected.chunk(2, dim=-1)  # [n, I] each
    if spec.activation == CLAMPED_SWIGLU:
        return clamped_swiglu(gate, up, alpha=spec.alpha, limit=spec.limit)
    return ACTIVATIONS[spec.activation](gate) * up


def clamped_swiglu(gate: Tensor, up: Tensor, *, alpha: float, limit: float) -> Tensor:
    """Return GPT-OSS's gated activation of gate and up, [n, I] each.

    Computed in float32 and rounded once: in 16 bits, each of its six steps would round.
    """
    x, y = gate.float().clamp(max=limit), up.float().clamp(-limit, limit)
    return ((y + 1) * (x * torch.sigmoid(x * alpha))).to(gate.dtype)


def _project(
    spec: KernelSpec, weights: Mapping[str, StackedParameter], name: str, expert: int, x: Tensor
) -> Tensor:
    weight = weights[name][expert]  # [out, in], or [in, out] if transposed
    bias = weights[f"{name}_bias"][expert] if spec.bias else None  # [out]
    if not spec.transposed:
        return F.linear(x, weight, bias)
    return x @ weight if bias is None else torch.addmm(bias, x, weight)  # [n, out]


def index_tensor(values: NDArray[Any], device: torch.device) -> Tensor:
    """Return `values` as an int64 tensor on `device`."""
    return torch.from_numpy(values.astype(np.int64, copy=False)).to(device)
