"""The lean kernel: the common gated expert, without importing transformers.

`act(x @ gate) * (x @ up) @ down`, the form of Mixtral, Qwen, OLMoE, DeepSeek and most others. Which
layers it is right for is decided when a store is prepared, by comparing it with the family's own
module; this file only computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from faasmoe_expert.functions.pairs import Pairs, Run, as_index

PADDED_ROWS = (1, 4, 8, 16, 32, 64)  # of products in reduced mode; above, multiples of the last
MAX_RUN_ROWS = 256  # products of experts with fewer rows go into one tensor; bounds its size

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


class Stacked(Protocol):
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


def run_gated(
    spec: KernelSpec, weights: Mapping[str, Stacked], hidden: Tensor, pairs: Pairs
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


def sum_gated(
    spec: KernelSpec, weights: Mapping[str, Stacked], hidden: Tensor, pairs: Pairs
) -> Tensor:
    """Return the weighted sum of each row's experts, [T, H] in `hidden`'s dtype.

    Sums in float32, in ascending order of experts. Arguments as in `run_gated`.
    """
    total = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)  # [T, H]
    for run in pairs.runs(padded_rows, max_rows=MAX_RUN_ROWS):
        index = as_index(pairs.row[run.positions], hidden.device)  # [n]
        scale = pairs.weight[as_index(run.positions, hidden.device), None]  # [n, 1]
        result = _run_mlp(spec, weights, run, hidden[index])  # [n, H]
        total.index_add_(0, index, result.float().mul_(scale))
    return total.to(hidden.dtype)


def padded_rows(n_rows: int) -> int:
    """Return how many rows a product of `n_rows` is computed with.

    oneDNN generates and keeps kernels of 1 to 1.5 MB for every row count that it meets: 40 counts
    cost a sandbox 52 MB. Few counts cost little time, because a product of few rows is bound by
    reading the weights.
    """
    for size in PADDED_ROWS:
        if n_rows <= size:
            return size
    return -(-n_rows // PADDED_ROWS[-1]) * PADDED_ROWS[-1]


def _run_mlp(spec: KernelSpec, weights: Mapping[str, Stacked], run: Run, rows: Tensor) -> Tensor:
    """Return the output of each pair of a run, not weighted, [n, H], from its row in `rows` [n, H].

    Products go into slices of one tensor for all experts, so that all else is done once for all of
    them: a tenth less time than expert by expert, with few rows each.
    """
    places = None  # [n]
    if run.n_rows > len(rows):
        places = as_index(run.places, rows.device)
        rows = rows.new_zeros(run.n_rows, rows.shape[1]).index_copy_(0, places, rows)  # [R, H]
    first = "up_proj" if spec.name == "plain" else "gate_up_proj"
    inner = inner_of(spec, _project_run(spec, weights, first, run, rows))  # [R, I]
    result = _project_run(spec, weights, "down_proj", run, inner)  # [R, H]
    return result if places is None else result[places]


def _project_run(
    spec: KernelSpec, weights: Mapping[str, Stacked], name: str, run: Run, x: Tensor
) -> Tensor:
    """Return each expert's rows of `x` [R, in] times its own weight: [R, out]."""
    outputs = weights[name][run.spans[0][0]].shape[1 if spec.transposed else 0]
    product = x.new_empty(run.n_rows, outputs)  # [R, out]
    for expert, begin, end in run.spans:
        weight = weights[name][expert]  # [out, in], or [in, out] if transposed
        bias = weights[f"{name}_bias"][expert] if spec.bias else None  # [out]
        matrix = weight if spec.transposed else weight.t()  # [in, out]
        out = product[begin:end]  # [n, out]
        if bias is None:
            torch.mm(x[begin:end], matrix, out=out)
        elif spec.transposed:
            torch.mm(x[begin:end], matrix, out=out).add_(bias)
        else:
            torch.addmm(bias, x[begin:end], matrix, out=out)
    return product


def expert_mlp(spec: KernelSpec, weights: Mapping[str, Stacked], expert: int, x: Tensor) -> Tensor:
    """Return one expert's output for rows `x` [n, H], not weighted: [n, H]."""
    first = "up_proj" if spec.name == "plain" else "gate_up_proj"
    inner = inner_of(spec, _project(spec, weights, first, expert, x))  # [n, I]
    return _project(spec, weights, "down_proj", expert, inner)  # [n, H]


def inner_of(spec: KernelSpec, projected: Tensor) -> Tensor:
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
    spec: KernelSpec, weights: Mapping[str, Stacked], name: str, expert: int, x: Tensor
) -> Tensor:
    weight = weights[name][expert]  # [out, in], or [in, out] if transposed
    bias = weights[f"{name}_bias"][expert] if spec.bias else None  # [out]
    if not spec.transposed:
        return F.linear(x, weight, bias)
    product = x @ weight  # [n, out]
    return product if bias is None else product + bias
