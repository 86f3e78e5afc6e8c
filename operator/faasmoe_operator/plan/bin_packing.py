"""Which sandbox a replica goes into: room in sandboxes, now and once actions in flight are done.

Knows nothing of why a replica is placed. A function is never twice in one sandbox. Sandboxes that
hold functions already are filled before a generic one is taken, so that few are needed; among them
one is preferred in which no function is called at the same time.
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
    """Free places and memory of one sandbox, the functions in it and what they keep apart."""

    slots_left: int
    memory_left_bytes: float
    functions: set[str]
    anti_affinity_keys: set[str]

    @classmethod
    def after_assignments(
        cls, assignments: Sequence[Assignment], shape: SandboxShape
    ) -> FreeCapacity:
        """Return the room that these assignments leave."""
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
        """Return whether a replica of this function fits in."""
        fits = self.slots_left > 0 and demand.memory_bytes <= self.memory_left_bytes
        return fits and demand.function not in self.functions

    def reserve(self, demand: FunctionDemand) -> None:
        """Put a replica of this function in."""
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
        now: room at this moment.
        later: room once what is being detached is gone, less the places kept for later.
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
        """Return the bin of a sandbox; `leaving` are (sandbox, function) about to be detached."""
        remaining = [
            a
            for a in sandbox.assignments
            if a.state is not AssignmentState.DETACHING
            and (sandbox.id, a.function) not in detaching
        ]
        sandbox_shape = sandbox.shape or shape
        now = FreeCapacity.after_assignments(sandbox.assignments, sandbox_shape)
        return cls(
            sandbox,
            free_now=now,
            free_later=FreeCapacity.after_assignments(remaining, sandbox_shape),
        )

    @property
    def is_ready(self) -> bool:
        """Whether functions can be attached at once."""
        return self.sandbox.state is SandboxState.READY

    @property
    def is_idle(self) -> bool:
        """Whether it is ready, holds nothing, and nothing was placed into it."""
        return self.is_ready and not self.free_now.functions and self.is_generic

    @property
    def is_generic(self) -> bool:
        """Whether it holds nothing, or soon will hold nothing, and nothing was placed into it."""
        return not self.free_later.functions

    def fits_now(self, demand: FunctionDemand) -> bool:
        """Return whether a replica can be attached, places kept for later considered."""
        return self.is_ready and self.free_now.fits(demand) and self.free_later.fits(demand)


class BinPacker:
    """Places replicas into sandboxes that are ready, or keeps places for them.

    At once they go into sandboxes of the current template first, the fullest first. Places are kept
    only in sandboxes of the current template, whose place the next round would keep again.

    Args:
        settings: what is current, and what a new sandbox can take.
        bins: the sandboxes there are.
        new: what room is left in sandboxes that will be created; grows by those needed here.
    """

    def __init__(
        self, settings: FleetSettings, bins: Iterable[Bin], *, new_sandboxes: list[FreeCapacity]
    ) -> None:
        self._shape = settings.shape
        order = _packing_order(bins, template_hash=settings.template_hash)
        known = [found for found in order if found.free_later.slots_left > 0]
        self._bins_now = [
            found for found in known if found.is_ready and found.free_now.slots_left > 0
        ]
        self._free_later = [
            f.free_later for f in known if f.sandbox.template_hash == settings.template_hash
        ]
        self._new_sandboxes = new_sandboxes
        self.n_new_sandboxes = 0
        """Sandboxes that have to be created for what was placed."""
        self.unschedulable: dict[str, None] = {}
        """Functions that no sandbox takes, and that a new one would not take either."""

    def place(self, demand: FunctionDemand) -> ObservedSandbox | None:
        """Return the sandbox to attach to; None if a place is kept for later."""
        candidates = (candidate for candidate in self._bins_now if candidate.fits_now(demand))
        found = self._find_without_conflict(demand) or next(candidates, None)
        if found is None:
            self._reserve_slot(demand)
            return None
        found.free_now.reserve(demand)
        found.free_later.reserve(demand)
        if found.free_now.slots_left == 0 or found.free_later.slots_left == 0:
            self._bins_now.remove(found)
        return found.sandbox

    def _find_without_conflict(self, demand: FunctionDemand) -> Bin | None:
        """Return a sandbox in use in which the function meets none that it keeps apart from."""
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

    def _reserve_slot(self, demand: FunctionDemand) -> None:
        for rooms in (self._free_later, self._new_sandboxes):
            room = next((candidate for candidate in rooms if candidate.fits(demand)), None)
            if room is not None:
                _reserve(room, demand, among=rooms)
                return
        if not self._shape.fits(demand.memory_bytes):
            self.unschedulable[demand.function] = None
            return
        self.n_new_sandboxes += 1
        self._new_sandboxes.append(FreeCapacity.after_assignments((), self._shape))
        _reserve(self._new_sandboxes[-1], demand, among=self._new_sandboxes)


def _reserve(room: FreeCapacity, demand: FunctionDemand, *, among: list[FreeCapacity]) -> None:
    room.reserve(demand)
    if room.slots_left == 0:
        among.remove(room)


def _packing_order(bins: Iterable[Bin], *, template_hash: str) -> list[Bin]:
    """Return the bins: current template first, ready first, fullest first, oldest first."""

    def order(known: Bin) -> tuple[bool, bool, int, tuple[float, str]]:
        outdated = known.sandbox.template_hash != template_hash
        return (outdated, not known.is_ready, known.free_now.slots_left, known.sandbox.age_key)

    return sorted(bins, key=order)
