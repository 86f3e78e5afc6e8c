"""Recorded state of the sandboxes and their functions, actions in flight included. No I/O.

This is the control core's only record of assignments. It is not persisted: the sandboxes hold the
truth, and a restarted control process reads it back from them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from faasmoe_operator.control.autoscalers import ObservedReplicas
from faasmoe_operator.control.functions import ManagedFunction
from faasmoe_operator.plan.fleet import (
    Assignment,
    AssignmentState,
    ObservedSandbox,
    SandboxShape,
    SandboxState,
)
from faasmoe_operator.platforms.base import Sandbox, SandboxTemplate

EMPTY_LIMIT_TTL_S = 60.0  # how long an empty sandbox's memory limit is assumed for new ones


@dataclass(slots=True)
class SandboxRecord:
    """The recorded state of one sandbox.

    Attributes:
        sandbox: as the platform observes it.
        created_at: when it was first observed, on the controller's clock.
        state: its lifecycle state; READY only after its functions were read back.
        functions: state of each assigned function, by id.
        was_ready: whether it has ever been ready.
        memory_limit_bytes: memory for its functions in total, as it reports; None for no limit.
    """

    sandbox: Sandbox
    created_at: float
    state: SandboxState = SandboxState.STARTING
    functions: dict[str, AssignmentState] = field(default_factory=dict)
    was_ready: bool = False
    memory_limit_bytes: int | None = None

    @property
    def attached(self) -> set[str]:
        """The functions that can be called."""
        return self.functions_in_state(AssignmentState.ATTACHED)

    def functions_in_state(self, state: AssignmentState) -> set[str]:
        """Return the functions in a state."""
        return {name for name, current in self.functions.items() if current is state}


class Fleet:
    """All sandboxes of one model.

    Args:
        functions: the model's functions by id.
        template: template of new sandboxes.

    Attributes:
        version: increases with everything that may have changed them.
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
        self.version = 0

    @property
    def sandboxes(self) -> Collection[SandboxRecord]:
        """All sandboxes that the platform lists."""
        return self._records.values()

    def get(self, sandbox_id: str) -> SandboxRecord | None:
        """Return a sandbox, or None if it does not exist."""
        return self._records.get(sandbox_id)

    def sync(self, sandboxes: Iterable[Sandbox], *, now: float) -> list[SandboxRecord]:
        """Replace the sandboxes by those that the platform lists; return the removed ones.

        That one has become ready changes nothing here: its functions have to be read back first.
        """
        observed = {sandbox.id: sandbox for sandbox in sandboxes}
        removed = [self._records.pop(name) for name in list(self._records) if name not in observed]
        is_changed = bool(removed)
        for name, sandbox in observed.items():
            record = self._records.get(name)
            if record is None:
                record = self._records[name] = SandboxRecord(sandbox, now)
                is_changed = True
            elif record.sandbox != sandbox:
                is_changed |= replace(record.sandbox, ready=sandbox.ready) != sandbox
            record.sandbox = sandbox
        self.version += is_changed
        return removed

    def awaiting_read_back(self) -> list[SandboxRecord]:
        """Return the sandboxes that are ready but whose functions were not read back yet."""
        return [m for m in self.sandboxes if m.state is SandboxState.STARTING and m.sandbox.ready]

    def adopt(self, sandbox_id: str, functions: Iterable[str]) -> None:
        """Mark a starting sandbox as ready, with the functions that it lists."""
        self.version += 1
        record = self._records.get(sandbox_id)
        if record is not None and record.state is SandboxState.STARTING:
            record.state, record.was_ready = SandboxState.READY, True
            record.functions = dict.fromkeys(functions, AssignmentState.ATTACHED)

    def set_memory_limit(
        self, sandbox_id: str, memory_limit_bytes: int | None, *, now: float
    ) -> None:
        """Record the memory limit that a sandbox reports."""
        if record := self._records.get(sandbox_id):
            record.memory_limit_bytes = memory_limit_bytes
            if not record.functions and record.sandbox.template_hash == self._template_hash:
                self._empty_limit = (now, memory_limit_bytes)

    @property
    def is_unlimited(self) -> bool:
        """Whether an empty sandbox has told that there is no memory limit, which then holds."""
        at, limit_bytes = self._empty_limit
        return at > -math.inf and limit_bytes is None

    def mark_full(self, sandbox_id: str) -> None:
        """Limit a sandbox to the memory of its current functions, until it reports a limit."""
        if record := self._records.get(sandbox_id):
            functions = (self._functions.get(function) for function in record.functions)
            record.memory_limit_bytes = sum(f.size_bytes for f in functions if f is not None)

    def new_sandbox_shape(self, *, now: float) -> SandboxShape:
        """Return the shape of a new sandbox: the memory limit of the last empty one, if recent."""
        at, limit_bytes = self._empty_limit
        return self._shape(limit_bytes if now - at <= EMPTY_LIMIT_TTL_S else None)

    def mark_failed(self, sandbox_id: str) -> None:
        """Mark a sandbox as failed; its functions do not count as replicas any more."""
        self._set_state(sandbox_id, SandboxState.FAILED)

    def mark_draining(self, sandbox_id: str) -> None:
        """Mark a sandbox as being deleted."""
        self._set_state(sandbox_id, SandboxState.DRAINING)

    def set_function_state(self, sandbox_id: str, function: str, state: AssignmentState) -> None:
        """Record a function's state in a sandbox; does nothing if the sandbox does not exist."""
        self.version += 1
        if record := self._records.get(sandbox_id):
            record.functions[function] = state

    def remove_function(self, sandbox_id: str, function: str) -> None:
        """Record that a function is no longer in a sandbox."""
        self.version += 1
        if record := self._records.get(sandbox_id):
            record.functions.pop(function, None)

    def start_creation(self, *, now: float) -> str:
        """Record that a sandbox is being created; return a name for `finish_creation`."""
        self._n_creations += 1
        name = f"creating{self._n_creations}"
        self._pending_creations[name] = now
        return name

    def finish_creation(self, name: str) -> None:
        """Record that a creation has succeeded or failed; the platform lists the new sandbox."""
        self._pending_creations.pop(name, None)

    def addresses(self) -> dict[str, tuple[str, ...]]:
        """Return the addresses of each function's ready replicas."""
        addresses: dict[str, tuple[str, ...]] = {}
        for record in self._ready_sandboxes():
            for function in record.attached:
                addresses[function] = (*addresses.get(function, ()), record.sandbox.address)
        return addresses

    def ready_replicas(self) -> Counter[str]:
        """Return the number of ready replicas by function."""
        return Counter(function for m in self._ready_sandboxes() for function in m.attached)

    def observed_replicas(self) -> dict[str, ObservedReplicas]:
        """Return the adopted replicas by function."""
        return {
            function: ObservedReplicas(count, count)
            for function, count in self.ready_replicas().items()
        }

    def n_generic(self) -> int:
        """Return the number of ready sandboxes without functions."""
        return sum(1 for record in self._ready_sandboxes() if not record.functions)

    def sandbox_states(self) -> Counter[SandboxState]:
        """Return the number of sandboxes by state; those being created count as starting."""
        states = Counter(record.state for record in self.sandboxes)
        states[SandboxState.STARTING] += len(self._pending_creations)
        return states

    @property
    def is_progressing(self) -> bool:
        """Whether a creation, attach or detach is in progress or a deletion is due."""
        transitional = (AssignmentState.ATTACHING, AssignmentState.DETACHING)
        return bool(self._pending_creations) or any(
            record.state is SandboxState.FAILED
            or any(state in transitional for state in record.functions.values())
            for record in self.sandboxes
            if record.state is not SandboxState.DRAINING
        )

    def oldest_starting_at(self) -> float:
        """Return when the oldest starting sandbox was created; infinity if none is starting."""
        starting = (m.created_at for m in self.sandboxes if m.state is SandboxState.STARTING)
        return min(starting, default=math.inf)

    def snapshot(self, *, last_used: Mapping[str, float] | None = None) -> list[ObservedSandbox]:
        """Return the sandboxes as input of the sandbox plan.

        Args:
            last_used: time of each function's last use.
        """
        used_at = last_used or {}
        creating = [
            ObservedSandbox(name, SandboxState.STARTING, self._template_hash, created_at)
            for name, created_at in self._pending_creations.items()
        ]
        return [*creating, *(self._snapshot_sandbox(record, used_at) for record in self.sandboxes)]

    def _snapshot_sandbox(
        self, record: SandboxRecord, last_used: Mapping[str, float]
    ) -> ObservedSandbox:
        limit_bytes = record.memory_limit_bytes
        return ObservedSandbox(
            id=record.sandbox.id,
            state=record.state,
            template_hash=record.sandbox.template_hash,
            created_at=record.created_at,
            assignments=tuple(self._assignment(*i, last_used) for i in record.functions.items()),
            shape=None if limit_bytes is None else self._shape(limit_bytes),
        )

    def _assignment(
        self, function: str, state: AssignmentState, last_used: Mapping[str, float]
    ) -> Assignment:
        managed = self._functions.get(function)
        if managed is None:  # a function of an earlier plan
            return Assignment(function, state)
        return Assignment(
            function,
            state,
            managed.size_bytes,
            last_used.get(function, 0.0),
            managed.anti_affinity_key,
        )

    def _shape(self, limit_bytes: int | None) -> SandboxShape:
        limit = None if limit_bytes is None else max(1, limit_bytes)
        return SandboxShape(self._capacity, limit)

    def _ready_sandboxes(self) -> list[SandboxRecord]:
        return [record for record in self.sandboxes if record.state is SandboxState.READY]

    def _set_state(self, sandbox_id: str, state: SandboxState) -> None:
        self.version += 1
        if record := self._records.get(sandbox_id):
            record.state = state
