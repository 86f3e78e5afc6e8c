"""Shared experts computed while a layer's calls are away.

A block's shared expert takes the same rows as its routed experts and is about as much work, so it
is the natural thing to do while functions compute. Families ask for it before the routed experts
(Qwen2-MoE) or after them (DeepSeek-V3). Before: its result is a `Deferred` tensor that is computed
once the calls are sent, or at the latest when anything looks at it. After: once a block has been
seen to do so, it is computed ahead, and the result is handed over if the rows are still the same.
Either way the same function of the same rows is computed, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

SHARED_NAMES = ("shared_expert", "shared_experts", "shared_mlp")


class Deferred(Tensor):
    """A tensor that is computed when something first looks at it."""

    _compute: Callable[[], Tensor]
    _value: Tensor | None

    @staticmethod
    def __new__(cls: type[Deferred], compute: Callable[[], Tensor]) -> Deferred:
        """Return a placeholder of what `compute` returns."""
        placeholder = Tensor._make_subclass(cls, torch.empty(0, device="cpu"))
        placeholder._compute = compute
        placeholder._value = None
        return placeholder

    def value(self) -> Tensor:
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
        values, named = tree_map_only(Deferred, Deferred.value, (args, dict(kwargs or {})))
        return func(*values, **named)


@dataclass(frozen=True, slots=True)
class _Rows:
    """What a computation was given, to tell whether it is asked for the same again."""

    rows: Tensor
    version: int

    @classmethod
    def of(cls, rows: Tensor) -> _Rows | None:
        return None if rows.is_inference() else cls(rows, rows._version)

    def are(self, other: Tensor) -> bool:
        return (
            not other.is_inference()
            and other.data_ptr() == self.rows.data_ptr()
            and other.numel() == self.rows.numel()
            and other.shape[-1] == self.rows.shape[-1]
            and other.dtype == self.rows.dtype
            and other.is_contiguous()
            and other._version == self.version
        )


class SharedExpert:
    """The shared expert of one MoE block, its forward replaced."""

    def __init__(self, module: nn.Module) -> None:
        self._forward: Callable[..., Tensor] = module.forward
        self._pending: Deferred | None = None
        self._ahead: tuple[_Rows, Tensor] | None = None
        self._last_rows: _Rows | None = None
        self._comes_after = False
        module.forward = self._ask

    def compute(self, rows: Tensor) -> None:
        """Do what can be done while the calls for `rows` [T, H] are away."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.value()
            return
        self._last_rows = _Rows.of(rows)
        if self._comes_after and self._last_rows is not None:
            self._ahead = (self._last_rows, self._forward(rows))

    def _ask(self, hidden: Tensor, *others: Any, **named: Any) -> Tensor:
        if others or named:  # it needs more than the rows: nothing can be foreseen
            return self._forward(hidden, *others, **named)
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0].are(hidden):
            return ahead[1].view(*hidden.shape[:-1], -1)
        last, self._last_rows = self._last_rows, None
        if last is not None and last.are(hidden):
            self._comes_after = True
            return self._forward(hidden)
        self._pending = Deferred(lambda: self._forward(hidden))
        return self._pending


def shared_expert_beside(model: nn.Module, experts_name: str) -> SharedExpert | None:
    """Take over the shared expert of the block that holds the module `experts_name`, if any."""
    block = model.get_submodule(experts_name.rpartition(".")[0])
    for name in SHARED_NAMES:
        module = getattr(block, name, None)
        if isinstance(module, nn.Module):
            return SharedExpert(module)
    return None
