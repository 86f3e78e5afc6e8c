"""Shared experts computed while a layer's calls are away.

A block's shared expert takes the same rows as its routed experts and is about as much work, so it
is the natural thing to do while functions compute. Families ask for it before the routed experts
(Qwen2-MoE) or after them (DeepSeek-V3). Before: its result is a `Deferred` tensor that is computed
once the calls are sent, or at the latest when anything looks at it. After: once a block has been
seen to do so, it is computed ahead, and the result is handed over if the rows are still the same.
Either way the same function of the same rows is computed, once.

The seam with transformers: an experts implementation that calls functions.

transformers lets a model's experts modules be computed by a registered implementation
(`transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS`); it is given the module, so each module is
bound to a dispatcher and its layer index once, after the model is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

SHARED_EXPERT_ATTRIBUTES = ("shared_expert", "shared_experts", "shared_mlp")


class DeferredTensor(Tensor):
    """A tensor that is computed when something first looks at it."""

    _compute: Callable[[], Tensor]
    _value: Tensor | None

    @staticmethod
    def __new__(cls: type[DeferredTensor], compute: Callable[[], Tensor]) -> DeferredTensor:
        """Return a placeholder of what `compute` returns."""
        placeholder = Tensor._make_subclass(cls, torch.empty(0, device="cpu"))
        placeholder._compute = compute
        placeholder._value = None
        return placeholder

    def materialize(self) -> Tensor:
        """Return the tensor, computing it if nobody has yet."""
        if self._value is None:
            self._value = self._compute()
            del self._compute
        return self._value

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Let any use see the value."""
        values, named = tree_map_only(
            DeferredTensor, DeferredTensor.materialize, (args, dict(kwargs or {}))
        )
        return func(*values, **named)


@dataclass(frozen=True, slots=True)
class _RowsFingerprint:
    """What a computation was given, to tell whether it is asked for the same again."""

    rows: Tensor
    version: int

    @classmethod
    def capture(cls, rows: Tensor) -> _RowsFingerprint | None:
        return None if rows.is_inference() else cls(rows, rows._version)

    def matches(self, other: Tensor) -> bool:
        return (
            not other.is_inference()
            and other.data_ptr() == self.rows.data_ptr()
            and other.numel() == self.rows.numel()
            and other.shape[-1] == self.rows.shape[-1]
            and other.dtype == self.rows.dtype
            and other.is_contiguous()
            and other._version == self.version
        )


class OverlappedSharedExpert:
    """The shared expert of one MoE block, its forward replaced."""

    def __init__(self, module: nn.Module) -> None:
        self._forward: Callable[..., Tensor] = module.forward
        self._pending: DeferredTensor | None = None
        self._precomputed: tuple[_RowsFingerprint, Tensor] | None = None
        self._last_rows: _RowsFingerprint | None = None
        self._runs_after_experts = False
        module.forward = self._overlapped_forward

    def compute_while_waiting(self, rows: Tensor) -> None:
        """Do what can be done while the calls for `rows` [T, H] are away."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.materialize()
            return
        self._last_rows = _RowsFingerprint.capture(rows)
        if self._runs_after_experts and self._last_rows is not None:
            self._precomputed = (self._last_rows, self._forward(rows))

    def _overlapped_forward(self, hidden: Tensor, *others: Any, **named: Any) -> Tensor:
        if others or named:  # it needs more than the rows: nothing can be foreseen
            return self._forward(hidden, *others, **named)
        precomputed, self._precomputed = self._precomputed, None
        if precomputed is not None and precomputed[0].matches(hidden):
            return precomputed[1].view(*hidden.shape[:-1], -1)
        last_rows, self._last_rows = self._last_rows, None
        if last_rows is not None and last_rows.matches(hidden):
            self._runs_after_experts = True
            return self._forward(hidden)
        self._pending = DeferredTensor(lambda: self._forward(hidden))
        return self._pending


def wrap_shared_expert(model: nn.Module, experts_name: str) -> OverlappedSharedExpert | None:
    """Take over the shared expert of the block that holds the module `experts_name`, if any."""
    block = model.get_submodule(experts_name.rpartition(".")[0])
    for name in SHARED_EXPERT_ATTRIBUTES:
        module = getattr(block, name, None)
        if isinstance(module, nn.Module):
            return OverlappedSharedExpert(module)
    return None


EXPERTS_IMPLEMENTATION = "faasmoe"
_BINDING_ATTRIBUTE = "_faasmoe_binding"


class MoELayerComputer(Protocol):
    """What computes a layer's experts."""

    def compute(
        self,
        layer: int,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weight: Tensor,
        *,
        while_waiting: Callable[[], None] = ...,
    ) -> Tensor:
        """Return the weighted sum of each token's experts, [T, H]."""


@dataclass(frozen=True, slots=True)
class _ExpertsBinding:
    """What an experts module calls, and its block's shared expert."""

    dispatcher: MoELayerComputer
    layer: int
    shared_expert: OverlappedSharedExpert | None


def register_implementation() -> None:
    """Make the implementation known to transformers; doing so again changes nothing."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, _experts_forward)


def bind_experts(model: nn.Module, names: Sequence[str], dispatcher: MoELayerComputer) -> None:
    """Let the experts modules `names`, in the order of their layer indices, call `dispatcher`.

    The shared expert beside each is computed while the calls are away.
    """
    for layer, name in enumerate(names):
        binding = _ExpertsBinding(dispatcher, layer, wrap_shared_expert(model, name))
        object.__setattr__(model.get_submodule(name), _BINDING_ATTRIBUTE, binding)


def _experts_forward(
    module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    binding: _ExpertsBinding = getattr(module, _BINDING_ATTRIBUTE)
    rows = hidden.reshape(-1, hidden.shape[-1])  # [T, H]
    top_k = top_k_index.shape[-1]
    index, weight = top_k_index.reshape(-1, top_k), top_k_weights.reshape(-1, top_k)  # [T, k] each
    if binding.shared_expert is None:
        total = binding.dispatcher.compute(binding.layer, rows, index, weight)  # [T, H]
    else:
        while_waiting = partial(binding.shared_expert.compute_while_waiting, rows)
        total = binding.dispatcher.compute(
            binding.layer, rows, index, weight, while_waiting=while_waiting
        )  # [T, H]
    return total.view(hidden.shape)
