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
    Demand,
    FleetSettings,
    Sandbox,
    SandboxState,
    Shape,
)


@dataclass(slots=True, eq=False)
class Room:
    """Free places and memory of one sandbox, the functions in it and what they keep apart."""

    places: int
    memory_bytes: float
    functions: set[str]
    apart: set[str]

    @classmethod
    def beside(cls, assignments: Sequence[Assignment], shape: Shape) -> Room:
        """Return the room that these assignments leave."""
        limit = math.inf if shape.memory_limit_bytes is None else shape.memory_limit_bytes
        return cls(
            places=shape.capacity - len(assignments),
            memory_bytes=limit - sum(assignment.memory_bytes for assignment in assignments),
            functions={assignment.function for assignment in assignments},
            apart={assignment.apart for assignment in assignments if assignment.apart},
        )

    def takes(self, demand: Demand) -> bool:
        """Return whether a replica of this function fits in."""
        fits = self.places > 0 and demand.memory_bytes <= self.memory_bytes
        return fits and demand.function not in self.functions

    def take(self, demand: Demand) -> None:
        """Put a replica of this function in."""
        self.places -= 1
        self.memory_bytes -= demand.memory_bytes
        self.functions.add(demand.function)
        if demand.apart:
            self.apart.add(demand.apart)


@dataclass(slots=True, eq=False)
class Bin:
    """A sandbox that replicas are placed into.

    Attributes:
        sandbox: the sandbox, as observed.
        now: room at this moment.
        later: room once what is being detached is gone, less the places kept for later.
    """

    sandbox: Sandbox
    now: Room
    later: Room

    @classmethod
    def of(cls, sandbox: Sandbox, shape: Shape, *, leaving: Collection[tuple[str, str]]) -> Bin:
        """Return the bin of a sandbox; `leaving` are (sandbox, function) about to be detached."""
        staying = [
            a
            for a in sandbox.assignments
            if a.state is not AssignmentState.DETACHING and (sandbox.id, a.function) not in leaving
        ]
        own = sandbox.shape or shape
        now = Room.beside(sandbox.assignments, own)
        return cls(sandbox, now=now, later=Room.beside(staying, own))

    @property
    def ready(self) -> bool:
        """Whether functions can be attached at once."""
        return self.sandbox.state is SandboxState.READY

    @property
    def idle(self) -> bool:
        """Whether it is ready, holds nothing, and nothing was placed into it."""
        return self.ready and not self.now.functions and self.generic

    @property
    def generic(self) -> bool:
        """Whether it holds nothing, or soon will hold nothing, and nothing was placed into it."""
        return not self.later.functions

    def takes_now(self, demand: Demand) -> bool:
        """Return whether a replica can be attached, places kept for later considered."""
        return self.ready and self.now.takes(demand) and self.later.takes(demand)


class Placement:
    """Places replicas into sandboxes that are ready, or keeps places for them.

    At once they go into sandboxes of the current template first, the fullest first. Places are kept
    only in sandboxes of the current template, whose place the next round would keep again.

    Args:
        settings: what is current, and what a new sandbox can take.
        bins: the sandboxes there are.
        new: what room is left in sandboxes that will be created; grows by those needed here.
    """

    def __init__(self, settings: FleetSettings, bins: Iterable[Bin], *, new: list[Room]) -> None:
        self._shape = settings.shape
        order = _filling_order(bins, template_hash=settings.template_hash)
        known = [found for found in order if found.later.places > 0]
        self._now = [found for found in known if found.ready and found.now.places > 0]
        self._later = [f.later for f in known if f.sandbox.template_hash == settings.template_hash]
        self._new = new
        self.n_new = 0
        """Sandboxes that have to be created for what was placed."""
        self.unplaceable: dict[str, None] = {}
        """Functions that no sandbox takes, and that a new one would not take either."""

    def place(self, demand: Demand) -> Sandbox | None:
        """Return the sandbox to attach to; None if a place is kept for later."""
        takers = (candidate for candidate in self._now if candidate.takes_now(demand))
        found = self._beside_others(demand) or next(takers, None)
        if found is None:
            self._keep_place(demand)
            return None
        found.now.take(demand)
        found.later.take(demand)
        if found.now.places == 0 or found.later.places == 0:
            self._now.remove(found)
        return found.sandbox

    def _beside_others(self, demand: Demand) -> Bin | None:
        """Return a sandbox in use in which the function meets none that it keeps apart from."""
        if not demand.apart or self._shape.capacity == 1:
            return None
        in_use = (candidate for candidate in self._now if candidate.now.functions)
        return next(
            (c for c in in_use if demand.apart not in c.now.apart and c.takes_now(demand)), None
        )

    def _keep_place(self, demand: Demand) -> None:
        for rooms in (self._later, self._new):
            room = next((candidate for candidate in rooms if candidate.takes(demand)), None)
            if room is not None:
                _fill(room, demand, among=rooms)
                return
        if not self._shape.takes(demand.memory_bytes):
            self.unplaceable[demand.function] = None
            return
        self.n_new += 1
        self._new.append(Room.beside((), self._shape))
        _fill(self._new[-1], demand, among=self._new)


def _fill(room: Room, demand: Demand, *, among: list[Room]) -> None:
    room.take(demand)
    if room.places == 0:
        among.remove(room)


def _filling_order(bins: Iterable[Bin], *, template_hash: str) -> list[Bin]:
    """Return the bins: current template first, ready first, fullest first, oldest first."""

    def order(known: Bin) -> tuple[bool, bool, int, tuple[float, str]]:
        outdated = known.sandbox.template_hash != template_hash
        return (outdated, not known.ready, known.now.places, known.sandbox.age_order)

    return sorted(bins, key=order)
