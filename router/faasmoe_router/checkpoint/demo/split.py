"""Cutting one dense feed-forward block into a shared expert, routed experts and their gate.

The busiest neurons become the shared expert; the others are clustered by co-activation into experts
of equal size; the gate is fitted by ridge regression to tell which experts matter for a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

SHARED_FRACTION, NUM_EXPERTS, TOP_K = 0.5, 8, 4
_GATE_SCALE = 0.05  # keeps the order of the logits but leaves the top-k weights close to 1/k
_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class DenseBlock:
    """The weights of a gated feed-forward block: gate and up [I, H], down [H, I]."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


def split_block(
    block: DenseBlock, inputs: torch.Tensor, *, exact: bool, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Return the Qwen2-MoE tensors that replace `block`, by their names under `mlp`.

    Args:
        block: the dense weights.
        inputs: what the block saw, [N, H].
        exact: every expert is active with equal weight, so the sum equals the dense block.
        generator: draws the first cluster centres.
    """
    hidden, neurons = block.down.shape
    activity = F.silu(inputs @ block.gate.T) * (inputs @ block.up.T)  # [N, I]
    activity = activity.abs() * block.down.norm(dim=0)  # [N, I]
    order = activity.mean(0).argsort(descending=True)  # [I]
    shared, rest = order.split([shared_size(neurons), neurons - shared_size(neurons)])
    owner = balanced_clusters(activity[:, rest].T, NUM_EXPERTS, generator=generator)  # [R]
    experts = [rest[owner == e] for e in range(NUM_EXPERTS)]
    gate = _fit_gate(inputs, torch.stack([activity[:, e].norm(dim=1) for e in experts], dim=1))
    active = NUM_EXPERTS if exact else TOP_K
    return {
        "gate.weight": torch.zeros_like(gate) if exact else gate,  # [E, H]
        "experts.gate_up_proj": torch.stack(
            [torch.cat([block.gate[e], block.up[e]]) for e in experts]
        ),  # [E, 2J, H]
        "experts.down_proj": torch.stack([block.down[:, e] for e in experts]) * active,  # [E, H, J]
        "shared_expert.gate_proj.weight": block.gate[shared],  # [S, H]
        "shared_expert.up_proj.weight": block.up[shared],  # [S, H]
        "shared_expert.down_proj.weight": block.down[:, shared]
        * 2,  # undoes sigmoid(0) of its gate
        "shared_expert_gate.weight": torch.zeros(1, hidden),  # [1, H]
    }


def shared_size(neurons: int) -> int:
    """Return the width of the shared expert of a block of `neurons`."""
    return int(neurons * SHARED_FRACTION)


def balanced_clusters(
    profiles: torch.Tensor, count: int, *, generator: torch.Generator
) -> torch.Tensor:
    """Return the cluster of each row of `profiles` [R, N], equal in size, by cosine similarity."""
    profiles = F.normalize(profiles, dim=1)  # [R, N]
    centres = profiles[torch.randperm(len(profiles), generator=generator)[:count]]  # [count, N]
    for _ in range(_ROUNDS):
        owner = _assign(profiles @ centres.T)  # [R]
        centres = torch.stack([profiles[owner == c].mean(0) for c in range(count)])  # [count, N]
    return owner


def _assign(similarity: torch.Tensor) -> torch.Tensor:
    """Give each row to its most similar cluster that has room, the best matches first."""
    rows, count = similarity.shape
    owner, room = [-1] * rows, [rows // count] * count
    for flat in similarity.flatten().argsort(descending=True, stable=True).tolist():
        row, cluster = divmod(flat, count)
        if owner[row] < 0 and room[cluster]:
            owner[row], room[cluster] = cluster, room[cluster] - 1
    return torch.tensor(owner)  # [R]


def _fit_gate(inputs: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
    """Return the gate [E, H] that predicts each expert's load [N, E] from the inputs [N, H]."""
    load = load - load.mean(dim=1, keepdim=True)  # [N, E]
    ridge = 0.01 * len(inputs) * inputs.pow(2).mean() * torch.eye(inputs.shape[1])  # [H, H]
    fitted = torch.linalg.solve(inputs.T @ inputs + ridge, inputs.T @ (load / load.std()))  # [H, E]
    gate: torch.Tensor = fitted.T * _GATE_SCALE  # [E, H]
    return gate
