"""Adding what functions return, in an order that does not depend on when it arrives."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from faasmoe_expert.wire import Mode
from faasmoe_router.dispatch.grouping import Group


class Sum(Protocol):
    """Collects the parts of one layer."""

    def put(self, position: int, group: Group, part: Tensor) -> None:
        """Take the outputs of the call at `position`; copies what it keeps."""

    def result(self) -> Tensor:
        """Return [T, H]."""


class ReducedSum:
    """Adds partial sums in float32, in the order of the calls."""

    def __init__(self, hidden: Tensor) -> None:
        self._hidden = hidden
        self._parts: dict[int, tuple[Group, Tensor]] = {}

    def put(self, position: int, group: Group, part: Tensor) -> None:
        """Take one vector for each of the group's rows: [R, H]."""
        self._parts[position] = (
            group,
            part.float() if part.dtype != torch.float32 else part.clone(),
        )

    def result(self) -> Tensor:
        """Return [T, H] in the batch's dtype."""
        total = torch.zeros(self._hidden.shape, dtype=torch.float32)  # [T, H]
        for _, (group, part) in sorted(self._parts.items()):
            if len(group.rows) == len(total):
                total += part
            else:
                total.index_add_(0, torch.from_numpy(group.rows), part)
        return total.to(self._hidden.dtype)


class UnreducedSum:
    """Puts each pair's output at its place and adds a token's experts in the gate's order."""

    def __init__(self, hidden: Tensor, top_k: int) -> None:
        self._dtype = hidden.dtype
        self._shape = (hidden.shape[0], top_k, hidden.shape[1])
        self._pairs = torch.zeros(hidden.shape[0] * top_k, hidden.shape[1])  # [T * k, H] float32

    def put(self, position: int, group: Group, part: Tensor) -> None:
        """Take one vector for each of the group's pairs: [P, H]."""
        self._pairs[torch.from_numpy(group.pair_slot)] = part.float()

    def result(self) -> Tensor:
        """Return [T, H] in the batch's dtype."""
        pairs = self._pairs.view(self._shape)  # [T, k, H]
        total = pairs[:, 0].clone()  # [T, H]
        for slot in range(1, self._shape[1]):  # not sum(): its order may depend on T
            total += pairs[:, slot]
        return total.to(self._dtype)


def new_sum(hidden: Tensor, *, mode: Mode, top_k: int) -> Sum:
    """Return the sum that fits `mode` for a batch `hidden` [T, H]."""
    return UnreducedSum(hidden, top_k) if mode is Mode.UNREDUCED else ReducedSum(hidden)
