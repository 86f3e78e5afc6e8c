"""The sandboxes and what is in them, actions in flight included. No I/O.

The one place where assignments are written down while the control runs; the truth is in the
sandboxes, from which a new control reads it back.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from faasmoe_operator.control.autoscalers import ObservedReplicas
from faasmoe_operator.control.functions import ManagedFunction
from faasmoe_operator.plan import fleet as plan
from faasmoe_operator.plan.fleet import AssignmentState, SandboxState
from faasmoe_operator.platforms.base import Sandbox, SandboxTemplate

EMPTY_LIMIT_TTL_S = 60.0  # for which what an empty sandbox said stands for those that are created


@dataclass(slots=True)
class SandboxRecord:
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
    was_ready: bool = False
    memory_limit_bytes: int | None = None

    @property
    def attached(self) -> set[str]:
        """The functions that serve calls."""
        return self.functions_in_state(AssignmentState.ATTACHED)

    def functions_in_state(self, state: AssignmentState) -> set[str]:
        """Return the functions in one state."""
        return {name for name, found in self.functions.items() if found is state}


class Fleet:
    """Every sandbox of one model.

    Args:
        functions: every function of the model, by id.
        template: of the sandboxes that are created now.
    """

    def __init__(
        self, functions: Mapping[str, ManagedFunction], *, template: SandboxTemplate
    ) -> None:
        self._functions = functions
        self._template_hash = template.digest
        self._capacity = template.capacity
        self._empty_limit: tuple[float, int | None] = (-math.inf, None)
        self._records: dict[str, SandboxRecord] = {}
        self._pending_creations: dict[str, float] = {}
        self._n_creations = 0

    @property
    def sandboxes(self) -> Collection[SandboxRecord]:
        """All sandboxes that have a process."""
        return self._records.values()

    def get(self, sandbox_id: str) -> SandboxRecord | None:
        """Return a sandbox, None if it is gone."""
        return self._records.get(sandbox_id)

    def sync(self, sandboxes: Iterable[Sandbox], *, now: float) -> list[SandboxRecord]:
        """Take what the platform sees; return the sandboxes that are gone."""
        seen = {sandbox.id: sandbox for sandbox in sandboxes}
        gone = [self._records.pop(name) for name in list(self._records) if name not in seen]
        for name, sandbox in seen.items():
            member = self._records.setdefault(name, SandboxRecord(sandbox, now))
            member.sandbox = sandbox
        return gone

    def awaiting_read_back(self) -> list[SandboxRecord]:
        """Return the sandboxes that say they are ready and whose functions were not read yet."""
        return [m for m in self.sandboxes if m.state is SandboxState.STARTING and m.sandbox.ready]

    def adopt(self, sandbox_id: str, functions: Iterable[str]) -> None:
        """Take a sandbox as ready, with the functions that it says it holds."""
        member = self._records.get(sandbox_id)
        if member is not None and member.state is SandboxState.STARTING:
            member.state, member.was_ready = SandboxState.READY, True
            member.functions = dict.fromkeys(functions, AssignmentState.ATTACHED)

    def set_memory_limit(
        self, sandbox_id: str, memory_limit_bytes: int | None, *, now: float
    ) -> None:
        """Note what a sandbox says that its functions may take."""
        if member := self._records.get(sandbox_id):
            member.memory_limit_bytes = memory_limit_bytes
            if not member.functions and member.sandbox.template_hash == self._template_hash:
                self._empty_limit = (now, memory_limit_bytes)

    def mark_full(self, sandbox_id: str) -> None:
        """Note that a sandbox has no memory for more than it holds, until it says otherwise."""
        if member := self._records.get(sandbox_id):
            known = (self._functions.get(function) for function in member.functions)
            member.memory_limit_bytes = sum(f.size_bytes for f in known if f is not None)

    def new_sandbox_shape(self, *, now: float) -> plan.SandboxShape:
        """Return what a new sandbox can take: as much memory as the last empty one, lately."""
        at, limit_bytes = self._empty_limit
        return self._shape(limit_bytes if now - at <= EMPTY_LIMIT_TTL_S else None)

    def mark_failed(self, sandbox_id: str) -> None:
        """Give a sandbox up: what is in it counts no more."""
        self._set_state(sandbox_id, SandboxState.FAILED)

    def mark_draining(self, sandbox_id: str) -> None:
        """Note that a sandbox is being deleted."""
        self._set_state(sandbox_id, SandboxState.DRAINING)

    def set_function_state(self, sandbox_id: str, function: str, state: AssignmentState) -> None:
        """Note a function's state in a sandbox, if that is still there."""
        if member := self._records.get(sandbox_id):
            member.functions[function] = state

    def remove_function(self, sandbox_id: str, function: str) -> None:
        """Note that a function is not in a sandbox any more."""
        if member := self._records.get(sandbox_id):
            member.functions.pop(function, None)

    def start_creation(self, *, now: float) -> str:
        """Note that a sandbox is being created; return a name for the creation."""
        self._n_creations += 1
        name = f"creating{self._n_creations}"
        self._pending_creations[name] = now
        return name

    def finish_creation(self, name: str) -> None:
        """Note that a creation has ended: the sandbox is the platform's to tell, or failed."""
        self._pending_creations.pop(name, None)

    def addresses(self) -> dict[str, tuple[str, ...]]:
        """Return where each function serves."""
        addresses: dict[str, tuple[str, ...]] = {}
        for member in self._ready_sandboxes():
            for function in member.attached:
                addresses[function] = (*addresses.get(function, ()), member.sandbox.address)
        return addresses

    def ready_replicas(self) -> Counter[str]:
        """Return how many replicas of each function serve."""
        return Counter(function for m in self._ready_sandboxes() for function in m.attached)

    def observed_replicas(self) -> dict[str, ObservedReplicas]:
        """Return the replicas of each function."""
        return {
            function: ObservedReplicas(count, count)
            for function, count in self.ready_replicas().items()
        }

    def n_generic(self) -> int:
        """Return how many sandboxes are ready and empty."""
        return sum(1 for member in self._ready_sandboxes() if not member.functions)

    def sandbox_states(self) -> Counter[SandboxState]:
        """Return how many sandboxes are in each state; those being created are starting."""
        states = Counter(member.state for member in self.sandboxes)
        states[SandboxState.STARTING] += len(self._pending_creations)
        return states

    @property
    def is_progressing(self) -> bool:
        """Whether a creation, an attach or a detach is under way, or a sandbox to be deleted."""
        transitional = (AssignmentState.ATTACHING, AssignmentState.DETACHING)
        return bool(self._pending_creations) or any(
            member.state is SandboxState.FAILED
            or any(state in transitional for state in member.functions.values())
            for member in self.sandboxes
            if member.state is not SandboxState.DRAINING
        )

    def oldest_starting_at(self) -> float:
        """Return since when the sandbox has been starting that has been for longest."""
        starting = (m.created_at for m in self.sandboxes if m.state is SandboxState.STARTING)
        return min(starting, default=math.inf)

    def snapshot(
        self, *, last_used: Mapping[str, float] | None = None
    ) -> list[plan.ObservedSandbox]:
        """Return what the sandbox plan starts from; `last_used` is by function."""
        used_at = last_used or {}
        creating = [
            plan.ObservedSandbox(name, SandboxState.STARTING, self._template_hash, created_at)
            for name, created_at in self._pending_creations.items()
        ]
        return [*creating, *(self._snapshot_sandbox(member, used_at) for member in self.sandboxes)]

    def _snapshot_sandbox(
        self, member: SandboxRecord, last_used: Mapping[str, float]
    ) -> plan.ObservedSandbox:
        limit_bytes = member.memory_limit_bytes
        return plan.ObservedSandbox(
            id=member.sandbox.id,
            state=member.state,
            template_hash=member.sandbox.template_hash,
            created_at=member.created_at,
            assignments=tuple(self._assignment(*i, last_used) for i in member.functions.items()),
            shape=None if limit_bytes is None else self._shape(limit_bytes),
        )

    def _assignment(
        self, function: str, state: AssignmentState, last_used: Mapping[str, float]
    ) -> plan.Assignment:
        known = self._functions.get(function)
        if known is None:
            return plan.Assignment(function, state)
        return plan.Assignment(
            function, state, known.size_bytes, last_used.get(function, 0.0), known.anti_affinity_key
        )

    def _shape(self, limit_bytes: int | None) -> plan.SandboxShape:
        limit = None if limit_bytes is None else max(1, limit_bytes)
        return plan.SandboxShape(self._capacity, limit)

    def _ready_sandboxes(self) -> list[SandboxRecord]:
        return [member for member in self.sandboxes if member.state is SandboxState.READY]

    def _set_state(self, sandbox_id: str, state: SandboxState) -> None:
        if member := self._records.get(sandbox_id):
            member.state = state
