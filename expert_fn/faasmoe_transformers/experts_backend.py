"""An experts implementation for transformers that hands a layer's computation to its caller.

transformers computes a model's experts modules by a registered implementation, which is called with
the module; each module is therefore bound to an object that computes its layer, after the model is
built.

While that object waits, for instance for remote calls, the shared expert of the block is computed:
it takes the same rows as the routed experts and is about as much work. Families call it before the
routed experts (Qwen2-MoE) or after them (DeepSeek-V3). Before: its result is a DeferredTensor,
computed while the layer waits, or at the latest when it is used. After: once a block has been seen
to do so, the result is computed ahead and used if the rows are still the same. Either way the same
function of the same rows is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

EXPERTS_IMPLEMENTATION = "faasmoe"
SHARED_EXPERT_ATTRIBUTES = ("shared_expert", "shared_experts", "shared_mlp")
_BINDING_ATTRIBUTE = "_faasmoe_binding"


class MoELayerComputer(Protocol):
    """Computes the routed experts of a layer."""

    def compute(
        self,
        layer: int,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weight: Tensor,
        *,
        while_waiting: Callable[[], None] = ...,
    ) -> Tensor:
        """Return the weighted sum of each token's experts, [T, H].

        Args:
            layer: index of the MoE layer.
            hidden: the tokens, [T, H].
            top_k_index: each token's experts, [T, k].
            top_k_weight: their weights, [T, k].
            while_waiting: called once, while results are awaited.
        """


class NativeFunctions(Protocol):
    """Addresses of native functions that begin and finish a layer, and their first argument."""

    context: int
    begin: int
    finish: int


class NativeCalls(Protocol):
    """The native side of a computer."""

    program: NativeFunctions

    def finish_pass(self) -> None:
        """Collect what happened in a pass; once, after its last layer."""


class NativeLayerComputer(MoELayerComputer, Protocol):
    """Also computes layers natively, for programs that call its functions themselves."""

    native: NativeCalls | None

    def start_pass(self, n_rows: int) -> None:
        """Start a pass of `n_rows` rows."""

    def compute_general(
        self,
        layer: int,
        hidden: Tensor,
        top_k_index: Tensor,
        top_k_weight: Tensor,
        *,
        while_waiting: Callable[[], None] = ...,
    ) -> Tensor:
        """Return the same as `compute` for a layer of a started pass that is not ordinary."""


def native_side_of(computer: MoELayerComputer) -> NativeLayerComputer | None:
    """Return the computer if it has a native side; else None."""
    native = cast("NativeLayerComputer", computer)
    return None if getattr(computer, "native", None) is None else native


def register_implementation() -> None:
    """Register the implementation with transformers; idempotent."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS_IMPLEMENTATION, _experts_forward)


def bind_experts(model: nn.Module, names: Sequence[str], computer: MoELayerComputer) -> None:
    """Make the experts modules `names` call `computer`, their positions being the layer indices.

    The shared expert beside each is computed while `computer` waits.
    """
    for layer, name in enumerate(names):
        binding = _ExpertsBinding(computer, layer, wrap_shared_expert(model, name))
        object.__setattr__(model.get_submodule(name), _BINDING_ATTRIBUTE, binding)


def bound_layer(module: nn.Module) -> int | None:
    """Return the layer index that an experts module is bound to; None for any other module."""
    binding: _ExpertsBinding | None = getattr(module, _BINDING_ATTRIBUTE, None)
    return None if binding is None else binding.layer


def bound_computers(model: nn.Module) -> dict[int, MoELayerComputer]:
    """Return what computes each MoE layer of a model, by layer index."""
    bindings = (getattr(module, _BINDING_ATTRIBUTE, None) for module in model.modules())
    return {binding.layer: binding.computer for binding in bindings if binding is not None}


@contextmanager
def substituted_computer(model: nn.Module, computer: MoELayerComputer) -> Iterator[None]:
    """Have all experts modules of a model call `computer` within the context."""
    bindings = [
        (module, binding)
        for module in model.modules()
        if (binding := getattr(module, _BINDING_ATTRIBUTE, None)) is not None
    ]
    for module, binding in bindings:
        object.__setattr__(module, _BINDING_ATTRIBUTE, replace(binding, computer=computer))
    try:
        yield
    finally:
        for module, binding in bindings:
            object.__setattr__(module, _BINDING_ATTRIBUTE, binding)


def wrap_shared_expert(model: nn.Module, experts_name: str) -> OverlappedSharedExpert | None:
    """Wrap the shared expert of the block that holds the module `experts_name`, if it has one."""
    block = model.get_submodule(experts_name.rpartition(".")[0])
    for name in SHARED_EXPERT_ATTRIBUTES:
        module = getattr(block, name, None)
        if isinstance(module, nn.Module):
            return OverlappedSharedExpert(module)
    return None


class DeferredTensor(Tensor):
    """A tensor that is computed when it is first used.

    Args:
        compute: returns the tensor; called at most once.
    """

    _compute: Callable[[], Tensor]
    _value: Tensor | None

    @staticmethod
    def __new__(cls: type[DeferredTensor], compute: Callable[[], Tensor]) -> DeferredTensor:
        """Return a placeholder for the result of `compute`."""
        placeholder = Tensor._make_subclass(cls, torch.empty(0, device="cpu"))
        placeholder._compute = compute
        placeholder._value = None
        return placeholder

    def materialize(self) -> Tensor:
        """Return the tensor, computing it on the first call."""
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
        """Apply `func` to the computed values."""
        values, named = tree_map_only(
            DeferredTensor, DeferredTensor.materialize, (args, dict(kwargs or {}))
        )
        return func(*values, **named)


class OverlappedSharedExpert:
    """The shared expert of one MoE block; replaces the module's forward.

    Args:
        module: the shared expert.
    """

    def __init__(self, module: nn.Module) -> None:
        self._forward: Callable[..., Tensor] = module.forward
        self._pending: DeferredTensor | None = None
        self._precomputed: tuple[_RowsFingerprint, Tensor] | None = None
        self._last_rows: _RowsFingerprint | None = None
        self._runs_after_experts = False
        module.forward = self._overlapped_forward

    def compute_while_waiting(self, rows: Tensor) -> None:
        """Compute what is deferred, or what the block will ask for, for `rows` [T, H]."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.materialize()
            return
        self._last_rows = _RowsFingerprint.capture(rows)
        if self._runs_after_experts and self._last_rows is not None:
            self._precomputed = (self._last_rows, self._forward(rows))

    def _overlapped_forward(self, hidden: Tensor, *others: Any, **named: Any) -> Tensor:
        if others or named:  # it takes more than the rows: its inputs cannot be foreseen
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


@dataclass(frozen=True, slots=True)
class _RowsFingerprint:
    """Identity of the rows of a computation, to recognize the same rows later."""

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


@dataclass(frozen=True, slots=True)
class _ExpertsBinding:
    """What an experts module calls, and the shared expert of its block."""

    computer: MoELayerComputer
    layer: int
    shared_expert: OverlappedSharedExpert | None


def _experts_forward(
    module: nn.Module, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    binding: _ExpertsBinding = getattr(module, _BINDING_ATTRIBUTE)
    rows = hidden.reshape(-1, hidden.shape[-1])  # [T, H]
    top_k = top_k_index.shape[-1]
    index, weight = top_k_index.reshape(-1, top_k), top_k_weights.reshape(-1, top_k)  # [T, k] each
    if binding.shared_expert is None:
        total = binding.computer.compute(binding.layer, rows, index, weight)  # [T, H]
    else:
        while_waiting = partial(binding.shared_expert.compute_while_waiting, rows)
        total = binding.computer.compute(
            binding.layer, rows, index, weight, while_waiting=while_waiting
        )  # [T, H]
    return total.view(hidden.shape)
