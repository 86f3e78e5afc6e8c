"""Records the calls of a model's experts modules and repeats them in other shapes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from families.registry import experts_modules
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """One call of an experts module, with its arguments and output."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


@contextmanager
def recorded_calls(model: nn.Module) -> Iterator[list[RecordedCall]]:
    """Record all calls of experts modules within the context, in order."""
    calls: list[RecordedCall] = []
    handles = [
        module.register_forward_hook(
            lambda module, args, kwargs, output, name=name: calls.append(
                RecordedCall(name, module, args, kwargs, output)
            ),
            with_kwargs=True,
        )
        for name, module in experts_modules(model).items()
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def even_blocks(n_experts: int, n_blocks: int = 3) -> list[range]:
    """Split the experts into consecutive blocks of nearly equal size: 8 gives 3, 3 and 2."""
    bounds = [-(-n_experts * index // n_blocks) for index in range(n_blocks + 1)]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def call_by_pairs(call: RecordedCall, experts: Sequence[int] | None = None) -> Tensor:
    """Repeat a call with one row per token-expert pair and sum the rows of each token.

    With `experts`, only pairs of these experts are computed, as in one function.
    """
    hidden, top_k_index, top_k_weights = call.args  # [T, H], [T, k], [T, k]
    wanted = torch.ones_like(top_k_index, dtype=torch.bool)  # [T, k]
    if experts is not None:
        wanted = torch.isin(top_k_index, torch.tensor(list(experts)))  # [T, k]
    tokens, slots = wanted.nonzero(as_tuple=True)  # [P], [P]
    total = torch.zeros_like(hidden)  # [T, H]
    with torch.no_grad():
        rows = call.module(  # [P, H]
            hidden[tokens],  # [P, H]
            top_k_index[tokens, slots].unsqueeze(-1),  # [P, 1]
            top_k_weights[tokens, slots].unsqueeze(-1),  # [P, 1]
        )
    return total.index_add_(0, tokens, rows)  # [T, H]
