"""The sandboxes and what is in them, actions in flight included. No I/O.

The one place where assignments are written down while the control runs; the truth is in the
sandboxes, from which a new control reads it back.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from faasmoe_operator.control.functions import ManagedFunction
from faasmoe_operator.control.scalers import Found
from faasmoe_operator.plan import fleet as plan
from faasmoe_operator.plan.fleet import AssignmentState, SandboxState
from faasmoe_operator.platforms.base import Sandbox, Template

EMPTY_LIMIT_S = 60.0  # for which what an empty sandbox said stands for those that are created


@dataclass(slots=True)
class Member:
    """One sandbox.

    Attributes:
        sandbox: as the platform sees it.
        created_at: when it was first seen.
        state: where it is in its life; ready only once its functions were read.
        functions: what is in it.
        served: whether it ever was ready.
        memory_limit_bytes: what its functions may take, as it says itself; None for no limit.
    """

    sandbox: Sandbox
    created_at: float
    state: SandboxState = SandboxState.STARTING
    functions: dict[str, AssignmentState] = field(default_factory=dict)
    served: bool = False
    memory_limit_bytes: int | None = None

    @property
    def attached(self) -> set[str]:
        """The functions that serve calls."""
        return self.of_state(AssignmentState.ATTACHED)

    def of_state(self, state: AssignmentState) -> set[str]:
        """Return the functions in one state."""
        return {name for name, found in self.functions.items() if found is state}


class Fleet:
    """Every sandbox of one model.

    Args:
        functions: every function of the model, by id.
        template: of the sandboxes that are created now.
    """

    def __init__(self, functions: Mapping[str, ManagedFunction], *, template: Template) -> None:
        self._functions = functions
        self._template_hash = template.digest
        self._capacity = template.capacity
        self._empty_limit: tuple[float, int | None] = (-math.inf, None)
        self._members: dict[str, Member] = {}
        self._creating: dict[str, float] = {}
        self._n_created = 0

    @property
    def members(self) -> Collection[Member]:
        """All sandboxes that have a process."""
        return self._members.values()

    def get(self, sandbox_id: str) -> Member | None:
        """Return a sandbox, None if it is gone."""
        return self._members.get(sandbox_id)

    def sync(self, sandboxes: Iterable[Sandbox], *, now: float) -> list[Member]:
        """Take what the platform sees; return the sandboxes that are gone."""
        seen = {sandbox.id: sandbox for sandbox in sandboxes}
        gone = [self._members.pop(name) for name in list(self._members) if name not in seen]
        for name, sandbox in seen.items():
            member = self._members.setdefault(name, Member(sandbox, now))
            member.sandbox = sandbox
        return gone

    def unread(self) -> list[Member]:
        """Return the sandboxes that say they are ready and whose functions were not read yet."""
        return [m for m in self.members if m.state is SandboxState.STARTING and m.sandbox.ready]

    def adopt(self, sandbox_id: str, functions: Iterable[str]) -> None:
        """Take a sandbox as ready, with the functions that it says it holds."""
        member = self._members.get(sandbox_id)
        if member is not None and member.state is SandboxState.STARTING:
            member.state, member.served = SandboxState.READY, True
            member.functions = dict.fromkeys(functions, AssignmentState.ATTACHED)

    def limit(self, sandbox_id: str, memory_limit_bytes: int | None, *, now: float) -> None:
        """Note what a sandbox says that its functions may take."""
        if member := self._members.get(sandbox_id):
            member.memory_limit_bytes = memory_limit_bytes
            if not member.functions and member.sandbox.template_hash == self._template_hash:
                self._empty_limit = (now, memory_limit_bytes)

    def fill(self, sandbox_id: str) -> None:
        """Note that a sandbox has no memory for more than it holds, until it says otherwise."""
        if member := self._members.get(sandbox_id):
            known = (self._functions.get(function) for function in member.functions)
            member.memory_limit_bytes = sum(f.size_bytes for f in known if f is not None)

    def shape_of_new(self, *, now: float) -> plan.Shape:
        """Return what a new sandbox can take: as much memory as the last empty one, lately."""
        at, limit_bytes = self._empty_limit
        return self._shape(limit_bytes if now - at <= EMPTY_LIMIT_S else None)

    def fail(self, sandbox_id: str) -> None:
        """Give a sandbox up: what is in it counts no more."""
        self._enter(sandbox_id, SandboxState.FAILED)

    def drain(self, sandbox_id: str) -> None:
        """Note that a sandbox is being deleted."""
        self._enter(sandbox_id, SandboxState.DRAINING)

    def put(self, sandbox_id: str, function: str, state: AssignmentState) -> None:
        """Note a function's state in a sandbox, if that is still there."""
        if member := self._members.get(sandbox_id):
            member.functions[function] = state

    def remove(self, sandbox_id: str, function: str) -> None:
        """Note that a function is not in a sandbox any more."""
        if member := self._members.get(sandbox_id):
            member.functions.pop(function, None)

    def begin_create(self, *, now: float) -> str:
        """Note that a sandbox is being created; return a name for the creation."""
        self._n_created += 1
        name = f"creating{self._n_created}"
        self._creating[name] = now
        return name

    def end_create(self, name: str) -> None:
        """Note that a creation has ended: the sandbox is the platform's to tell, or failed."""
        self._creating.pop(name, None)

    def addresses(self) -> dict[str, tuple[str, ...]]:
        """Return where each function serves."""
        places: dict[str, tuple[str, ...]] = {}
        for member in self._serving():
            for function in member.attached:
                places[function] = (*places.get(function, ()), member.sandbox.address)
        return places

    def ready(self) -> Counter[str]:
        """Return how many replicas of each function serve."""
        return Counter(function for m in self._serving() for function in m.attached)

    def found(self) -> dict[str, Found]:
        """Return the replicas of each function."""
        return {function: Found(count, count) for function, count in self.ready().items()}

    def n_generic(self) -> int:
        """Return how many sandboxes are ready and empty."""
        return sum(1 for member in self._serving() if not member.functions)

    def states(self) -> Counter[SandboxState]:
        """Return how many sandboxes are in each state; those being created are starting."""
        states = Counter(member.state for member in self.members)
        states[SandboxState.STARTING] += len(self._creating)
        return states

    @property
    def is_in_motion(self) -> bool:
        """Whether a creation, an attach or a detach is under way, or a sandbox to be deleted."""
        moving = (AssignmentState.ATTACHING, AssignmentState.DETACHING)
        return bool(self._creating) or any(
            member.state is SandboxState.FAILED
            or any(state in moving for state in member.functions.values())
            for member in self.members
            if member.state is not SandboxState.DRAINING
        )

    def starting_since(self) -> float:
        """Return since when the sandbox has been starting that has been for longest."""
        starting = (m.created_at for m in self.members if m.state is SandboxState.STARTING)
        return min(starting, default=math.inf)

    def observed(self, *, last_used: Mapping[str, float] | None = None) -> list[plan.Sandbox]:
        """Return what the sandbox plan starts from; `last_used` is by function."""
        used = last_used or {}
        creating = [
            plan.Sandbox(name, SandboxState.STARTING, self._template_hash, created_at)
            for name, created_at in self._creating.items()
        ]
        return [*creating, *(self._observed(member, used) for member in self.members)]

    def _observed(self, member: Member, used: Mapping[str, float]) -> plan.Sandbox:
        limit_bytes = member.memory_limit_bytes
        return plan.Sandbox(
            id=member.sandbox.id,
            state=member.state,
            template_hash=member.sandbox.template_hash,
            created_at=member.created_at,
            assignments=tuple(self._assignment(*i, used) for i in member.functions.items()),
            shape=None if limit_bytes is None else self._shape(limit_bytes),
        )

    def _assignment(
        self, function: str, state: AssignmentState, used: Mapping[str, float]
    ) -> plan.Assignment:
        known = self._functions.get(function)
        if known is None:
            return plan.Assignment(function, state)
        return plan.Assignment(
            function, state, known.size_bytes, used.get(function, 0.0), known.apart
        )

    def _shape(self, limit_bytes: int | None) -> plan.Shape:
        least = None if limit_bytes is None else max(1, limit_bytes)
        return plan.Shape(self._capacity, least)

    def _serving(self) -> list[Member]:
        return [member for member in self.members if member.state is SandboxState.READY]

    def _enter(self, sandbox_id: str, state: SandboxState) -> None:
        if member := self._members.get(sandbox_id):
            member.state = state
