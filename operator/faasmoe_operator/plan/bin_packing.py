"""Bin packing: places replicas into the free capacity of sandboxes, now and after detaches.

Knows nothing of why a replica is placed. A function is never placed twice in one sandbox. Sandboxes
with functions are filled before an empty one is used, so that few are needed. Among them, one
without a function of the same anti-affinity key is preferred.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from faasmoe_operator.plan.fleet import (
    Assignment,
    AssignmentState,
    FleetSettings,
    FunctionDemand,
    ObservedSandbox,
    SandboxShape,
    SandboxState,
)


@dataclass(slots=True, eq=False)
class FreeCapacity:
    """Free capacity of one sandbox, and its functions with their anti-affinity keys."""

    slots_left: int
    memory_left_bytes: float
    functions: set[str]
    anti_affinity_keys: set[str]

    @classmethod
    def after_assignments(
        cls, assignments: Sequence[Assignment], shape: SandboxShape
    ) -> FreeCapacity:
        """Return the capacity that these assignments leave free."""
        limit = math.inf if shape.memory_limit_bytes is None else shape.memory_limit_bytes
        return cls(
            slots_left=shape.capacity - len(assignments),
            memory_left_bytes=limit - sum(assignment.memory_bytes for assignment in assignments),
            functions={assignment.function for assignment in assignments},
            anti_affinity_keys={
                assignment.anti_affinity_key
                for assignment in assignments
                if assignment.anti_affinity_key
            },
        )

    def fits(self, demand: FunctionDemand) -> bool:
        """Return whether a replica of this function fits."""
        has_room = self.slots_left > 0 and demand.memory_bytes <= self.memory_left_bytes
        return has_room and demand.function not in self.functions

    def reserve(self, demand: FunctionDemand) -> None:
        """Subtract the capacity of a replica of this function."""
        self.slots_left -= 1
        self.memory_left_bytes -= demand.memory_bytes
        self.functions.add(demand.function)
        if demand.anti_affinity_key:
            self.anti_affinity_keys.add(demand.anti_affinity_key)


@dataclass(slots=True, eq=False)
class Bin:
    """A sandbox that replicas are placed into.

    Attributes:
        sandbox: the sandbox, as observed.
        free_now: capacity that is free now.
        free_later: capacity that is free after all detaches, minus reservations.
    """

    sandbox: ObservedSandbox
    free_now: FreeCapacity
    free_later: FreeCapacity

    @classmethod
    def from_sandbox(
        cls,
        sandbox: ObservedSandbox,
        shape: SandboxShape,
        *,
        detaching: Collection[tuple[str, str]],
    ) -> Bin:
        """Return the bin of a sandbox.

        Args:
            sandbox: the sandbox.
            shape: what it can hold if it has no shape of its own.
            detaching: (sandbox, function) ids that the plan detaches.
        """
        remaining = [
            a
            for a in sandbox.assignments
            if a.state is not AssignmentState.DETACHING
            and (sandbox.id, a.function) not in detaching
        ]
        shape = sandbox.shape or shape
        return cls(
            sandbox,
            free_now=FreeCapacity.after_assignments(sandbox.assignments, shape),
            free_later=FreeCapacity.after_assignments(remaining, shape),
        )

    @property
    def is_ready(self) -> bool:
        """Whether functions can be attached now."""
        return self.sandbox.state is SandboxState.READY

    @property
    def is_idle(self) -> bool:
        """Whether it is ready and empty, and nothing was placed into it."""
        return self.is_ready and not self.free_now.functions and self.is_generic

    @property
    def is_generic(self) -> bool:
        """Whether it is empty, or will be after all detaches, and nothing was placed into it."""
        return not self.free_later.functions

    def fits_now(self, demand: FunctionDemand) -> bool:
        """Return whether a replica can be attached now without taking reserved capacity."""
        return self.is_ready and self.free_now.fits(demand) and self.free_later.fits(demand)


class BinPacker:
    """Places replicas into ready sandboxes, or reserves capacity for them.

    Ready sandboxes with the current template come first, the fullest first. Capacity is reserved
    only in sandboxes with the current template, where the next pass would reserve it again.

    Args:
        settings: the current template and the shape of new sandboxes.
        bins: the existing sandboxes.
        new_sandboxes: free capacity of the sandboxes to create; the packer appends those it needs.
    """

    def __init__(
        self, settings: FleetSettings, bins: Iterable[Bin], *, new_sandboxes: list[FreeCapacity]
    ) -> None:
        self._shape = settings.shape
        ordered = _packing_order(bins, template_hash=settings.template_hash)
        usable = [candidate for candidate in ordered if candidate.free_later.slots_left > 0]
        self._bins_now = [b for b in usable if b.is_ready and b.free_now.slots_left > 0]
        self._free_later = [
            b.free_later for b in usable if b.sandbox.template_hash == settings.template_hash
        ]
        self._new_sandboxes = new_sandboxes
        self.n_new_sandboxes = 0
        """Number of sandboxes that must be created for the placed replicas."""
        self.unschedulable: dict[str, None] = {}
        """Functions that fit neither in an existing nor in a new sandbox."""

    def place(self, demand: FunctionDemand) -> ObservedSandbox | None:
        """Return the sandbox to attach to now, or None if capacity was reserved for later."""
        candidates = (candidate for candidate in self._bins_now if candidate.fits_now(demand))
        chosen = self._find_without_conflict(demand) or next(candidates, None)
        if chosen is None:
            self._reserve_later(demand)
            return None
        chosen.free_now.reserve(demand)
        chosen.free_later.reserve(demand)
        if chosen.free_now.slots_left == 0 or chosen.free_later.slots_left == 0:
            self._bins_now.remove(chosen)
        return chosen.sandbox

    def _find_without_conflict(self, demand: FunctionDemand) -> Bin | None:
        """Return a non-empty sandbox without a function of the same anti-affinity key, or None."""
        if not demand.anti_affinity_key or self._shape.capacity == 1:
            return None
        in_use = (candidate for candidate in self._bins_now if candidate.free_now.functions)
        return next(
            (
                c
                for c in in_use
                if demand.anti_affinity_key not in c.free_now.anti_affinity_keys
                and c.fits_now(demand)
            ),
            None,
        )

    def _reserve_later(self, demand: FunctionDemand) -> None:
        for candidates in (self._free_later, self._new_sandboxes):
            chosen = next((free for free in candidates if free.fits(demand)), None)
            if chosen is not None:
                _reserve(chosen, demand, candidates=candidates)
                return
        if not self._shape.fits(demand.memory_bytes):
            self.unschedulable[demand.function] = None
            return
        self.n_new_sandboxes += 1
        self._new_sandboxes.append(FreeCapacity.after_assignments((), self._shape))
        _reserve(self._new_sandboxes[-1], demand, candidates=self._new_sandboxes)


def _reserve(free: FreeCapacity, demand: FunctionDemand, *, candidates: list[FreeCapacity]) -> None:
    free.reserve(demand)
    if free.slots_left == 0:
        candidates.remove(free)


def _packing_order(bins: Iterable[Bin], *, template_hash: str) -> list[Bin]:
    """Return the bins: current template first, ready first, fullest first, oldest first."""

    def sort_key(item: Bin) -> tuple[bool, bool, int, tuple[float, str]]:
        is_outdated = item.sandbox.template_hash != template_hash
        return (is_outdated, not item.is_ready, item.free_now.slots_left, item.sandbox.age_key)

    return sorted(bins, key=sort_key)
