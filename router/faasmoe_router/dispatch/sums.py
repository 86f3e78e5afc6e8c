"""Adding what functions return, in an order that does not depend on when it arrives.

Each part is added as soon as those before it are, while the others are away. On a GPU the sum is
made there: adding three parts of 64 rows takes the host a quarter of a millisecond, which would be
a large part of a layer (docs/performance.md).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from faasmoe_expert.wire import Mode
from faasmoe_router.dispatch.grouping import Group


class Way(Protocol):
    """How parts get to where they are added."""

    @property
    def device(self) -> torch.device:
        """Where they are added."""

    def bring(self, host: Tensor) -> Tensor:
        """Return a host tensor there, for use before the host's changes."""

    def keep(self, host: Tensor) -> Tensor:
        """Return a host tensor there, for use afterwards too."""


class AtHome:
    """Parts are added on the host, where they are."""

    device = torch.device("cpu")

    def bring(self, host: Tensor) -> Tensor:
        """Return it."""
        return host

    def keep(self, host: Tensor) -> Tensor:
        """Return a copy."""
        return host.clone()


class Sum(Protocol):
    """Collects the parts of one layer."""

    def put(self, position: int, group: Group, part: Tensor) -> None:
        """Take the outputs of the call at `position`; copies what it keeps."""

    def result(self) -> Tensor:
        """Return [T, H], once all parts are there."""


class ReducedSum:
    """Adds partial sums in float32, in the order of the calls.

    Args:
        hidden: the batch, [T, H], anywhere: its shape and dtype are those of the sum.
        way: how parts get to where they are added.
    """

    def __init__(self, hidden: Tensor, way: Way) -> None:
        self._dtype = hidden.dtype
        self._way = way
        self._total = torch.zeros(hidden.shape, dtype=torch.float32, device=way.device)  # [T, H]
        self._next = 0
        self._early: dict[int, tuple[Group, Tensor]] = {}  # came before one that precedes it

    def put(self, position: int, group: Group, part: Tensor) -> None:
        """Take one vector for each of the group's rows: [R, H]."""
        if position < self._next:  # it is in the sum already, and must not be there twice
            return
        if position > self._next:
            self._early[position] = (group, self._way.keep(part))
            return
        self._add(group, self._way.bring(part))
        self._next += 1
        while (early := self._early.pop(self._next, None)) is not None:
            self._add(*early)
            self._next += 1

    def result(self) -> Tensor:
        """Return [T, H] in the batch's dtype."""
        for position in sorted(self._early):
            self._add(*self._early.pop(position))
        return self._total.to(self._dtype)

    def _add(self, group: Group, part: Tensor) -> None:
        if len(group.rows) == len(self._total):
            self._total += part
        else:
            rows = self._way.bring(torch.from_numpy(group.rows))  # [R]
            self._total.index_add_(0, rows, part.float())


class UnreducedSum:
    """Puts each pair's output at its place and adds a token's experts in the gate's order.

    Args:
        hidden: the batch, [T, H], anywhere: its shape and dtype are those of the sum.
        top_k: slots k of each token.
        way: how outputs get to where they are added.
    """

    def __init__(self, hidden: Tensor, top_k: int, way: Way) -> None:
        self._dtype = hidden.dtype
        self._way = way
        n_rows, hidden_size = hidden.shape
        self._shape = (n_rows, top_k, hidden_size)
        self._pairs = torch.zeros(n_rows * top_k, hidden_size, device=way.device)
        # [T * k, H] float32

    def put(self, position: int, group: Group, part: Tensor) -> None:
        """Take one vector for each of the group's pairs: [P, H]."""
        slots = self._way.bring(torch.from_numpy(group.pair_slot))  # [P]
        self._pairs[slots] = self._way.bring(part).float()

    def result(self) -> Tensor:
        """Return [T, H] in the batch's dtype."""
        pairs = self._pairs.view(self._shape)  # [T, k, H]
        total = pairs[:, 0].clone()  # [T, H]
        for slot in range(1, self._shape[1]):  # not sum(): its order may depend on T
            total += pairs[:, slot]
        return total.to(self._dtype)


def new_sum(hidden: Tensor, *, mode: Mode, top_k: int, way: Way | None = None) -> Sum:
    """Return the sum that fits `mode` for a batch `hidden` [T, H]; on the host without a way."""
    way = way or AtHome()
    if mode is Mode.UNREDUCED:
        return UnreducedSum(hidden, top_k, way)
    return ReducedSum(hidden, way)
