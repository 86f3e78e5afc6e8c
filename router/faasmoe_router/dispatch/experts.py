"""The seam with transformers: an experts implementation that calls functions.

transformers lets a model's experts modules be computed by a registered implementation
(`transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS`); it is given the module, so each module is
bound to a dispatcher and its layer index once, after the model is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from faasmoe_router.dispatch.overlap import SharedExpert, shared_expert_beside

IMPLEMENTATION = "faasmoe"
_BINDING = "_faasmoe_binding"


class ComputesLayers(Protocol):
    """What computes a layer's experts."""

    def compute(
        self,
        layer: int,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weight: Tensor,
        *,
        meanwhile: Callable[[], None] = ...,
    ) -> Tensor:
        """Return the weighted sum of each token's experts, [T, H]."""


@dataclass(frozen=True, slots=True)
class _Binding:
    """What an experts module calls, and its block's shared expert."""

    dispatcher: ComputesLayers
    layer: int
    shared: SharedExpert | None


def register() -> None:
    """Make the implementation known to transformers; doing so again changes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)


def bind_experts(model: nn.Module, names: Sequence[str], dispatcher: ComputesLayers) -> None:
    """Let the experts modules `names`, in the order of their layer indices, call `dispatcher`.

    The shared expert beside each is computed while the calls are away.
    """
    for layer, name in enumerate(names):
        binding = _Binding(dispatcher, layer, shared_expert_beside(model, name))
        object.__setattr__(model.get_submodule(name), _BINDING, binding)


def _forward(
    module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    binding: _Binding = getattr(module, _BINDING)
    rows = hidden.reshape(-1, hidden.shape[-1])  # [T, H]
    top_k = top_k_index.shape[-1]
    index, weight = top_k_index.reshape(-1, top_k), top_k_weights.reshape(-1, top_k)  # [T, k] each
    if binding.shared is None:
        total = binding.dispatcher.compute(binding.layer, rows, index, weight)  # [T, H]
    else:
        meanwhile = partial(binding.shared.compute, rows)
        total = binding.dispatcher.compute(
            binding.layer, rows, index, weight, meanwhile=meanwhile
        )  # [T, H]
    return total.view(hidden.shape)
