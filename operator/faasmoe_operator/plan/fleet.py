"""Input of the sandbox plan: fleet settings, function demand and the observed sandboxes.

Actions in progress are part of the observation, as sandboxes that are starting or draining and
functions that are being attached or detached. Therefore no action is planned twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from faasmoe_operator.errors import PlanError

EVICT_IDLE_S = 2.0
"""Since its last use, as loads are reported once a second."""


def _check_minimum(field: str, value: int, *, minimum: int) -> None:
    if value < minimum:
        raise PlanError(f"{field}: got {value}, expected at least {minimum}")


@dataclass(frozen=True, slots=True)
class SandboxShape:
    """What one sandbox can hold; raises PlanError if that is nothing.

    Attributes:
        capacity: maximum number of functions.
        memory_limit_bytes: memory limit of all its functions together; None for no limit.
    """

    capacity: int = 1
    memory_limit_bytes: int | None = None

    def __post_init__(self) -> None:
        """Validate the limits."""
        _check_minimum("capacity", self.capacity, minimum=1)
        if self.memory_limit_bytes is not None:
            _check_minimum("memory_limit_bytes", self.memory_limit_bytes, minimum=1)

    def fits(self, memory_bytes: int) -> bool:
        """Return whether a function of this size fits in an empty sandbox."""
        return self.memory_limit_bytes is None or memory_bytes <= self.memory_limit_bytes


@dataclass(frozen=True, slots=True)
class MemoryHolder:
    """Something that holds memory: a function in a sandbox, or a router.

    Attributes:
        key: sandbox and function; for a router an empty text and its name.
        size_bytes: its memory.
        last_used: time of its last use.
        is_evictable: whether it may be evicted once it is not in use.
        is_leaving: whether it is being evicted already.
        is_idle: whether it is known not to be in use, however short ago it was.
        is_pinned: whether it is never evicted.
        content: name of what it maps: all that map the same hold it once; empty if nobody else
            maps it.
        private_bytes: of its memory, what it maps with nobody else in any case.
    """

    key: tuple[str, str]
    size_bytes: int
    last_used: float
    is_evictable: bool = True
    is_leaving: bool = False
    is_idle: bool = False
    is_pinned: bool = False
    content: str = ""
    private_bytes: int = 0

    @property
    def name(self) -> str:
        """The function, or the router."""
        return self.key[1]

    def changed(
        self,
        *,
        size_bytes: int | None = None,
        last_used: float | None = None,
        is_evictable: bool | None = None,
        is_leaving: bool | None = None,
        is_idle: bool | None = None,
    ) -> MemoryHolder:
        """Return it with other values; in a third of the time that `dataclasses.replace` takes.

        Plans of many models do so for each of their functions.
        """
        return MemoryHolder(
            self.key,
            self.size_bytes if size_bytes is None else size_bytes,
            self.last_used if last_used is None else last_used,
            self.is_evictable if is_evictable is None else is_evictable,
            self.is_leaving if is_leaving is None else is_leaving,
            self.is_idle if is_idle is None else is_idle,
            self.is_pinned,
            self.content,
            self.private_bytes,
        )


@dataclass(frozen=True, slots=True)
class MemoryClaim:
    """Something that waits for memory.

    Attributes:
        name: the function, or the router.
        size_bytes: its memory.
        last_used: time of the last request that waited for it.
        waiting_since: time since when requests wait for it; 0 if that is not known.
    """

    name: str
    size_bytes: int
    last_used: float
    waiting_since: float = 0.0

    def precedes(self, other: MemoryClaim) -> bool:
        """Return whether it gets memory before another one.

        The one used last is first; of several that requests wait for, the one that waits longest.
        """
        return self.rank > other.rank

    @property
    def rank(self) -> tuple[float, float, str]:
        """Sort key: what gets memory first is last."""
        return self.last_used, -self.waiting_since, self.name


@dataclass(frozen=True, slots=True)
class MachineMemory:
    """Memory that all models of a machine share, as one of them sees it.

    Attributes:
        limit_bytes: limit of all functions and routers together.
        others: what is not the model's functions: those of other models, and routers.
        claims: what other models and routers wait for.
        own_extra_bytes: what the model's functions that stay hold beyond their sizes, for their
            sandboxes; below 0 if they share memory.
        resident: functions of the model whose memory is held already, by others that map the same.
    """

    limit_bytes: int
    others: tuple[MemoryHolder, ...] = ()
    claims: tuple[MemoryClaim, ...] = ()
    own_extra_bytes: int = 0
    resident: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        """Validate the limit."""
        _check_minimum("limit_bytes", self.limit_bytes, minimum=1)


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """Desired state of a model's sandboxes; raises PlanError if a setting is out of bounds.

    Attributes:
        template_hash: digest of the current template.
        warm_pool: number of empty sandboxes to keep ready in addition to those in use.
        shape: what one sandbox can hold.
        max_creates: maximum number of sandboxes created in one pass; 0 while backed off.
        max_surge: maximum number of concurrent replacements after a template change.
        start_deadline_s: how long a sandbox may take to become ready.
        memory_limit_bytes: memory limit of all functions in all sandboxes; None for no limit.
        evict_idle_s: minimum seconds since the last use of a function that is evicted.
        machine: memory that the model shares with others; None for no limit.
    """

    template_hash: str
    warm_pool: int = 1
    shape: SandboxShape = SandboxShape()
    max_creates: int = 8
    max_surge: int = 1
    start_deadline_s: float = 600.0
    memory_limit_bytes: int | None = None
    evict_idle_s: float = EVICT_IDLE_S
    machine: MachineMemory | None = None

    def __post_init__(self) -> None:
        """Validate the numbers."""
        if self.memory_limit_bytes is not None:
            _check_minimum("memory_limit_bytes", self.memory_limit_bytes, minimum=1)
        _check_minimum("warm_pool", self.warm_pool, minimum=0)
        _check_minimum("max_creates", self.max_creates, minimum=0)
        _check_minimum("max_surge", self.max_surge, minimum=1)
        if not self.start_deadline_s > 0:
            raise PlanError(f"start_deadline_s: got {self.start_deadline_s}, expected more than 0")

    @property
    def is_memory_limited(self) -> bool:
        """Whether functions may have to wait for memory."""
        return self.memory_limit_bytes is not None or self.machine is not None

    def fits_memory_limit(self, memory_bytes: int) -> bool:
        """Return whether a function of this size fits within the memory limits."""
        machine_bytes = None if self.machine is None else self.machine.limit_bytes
        limits = (self.memory_limit_bytes, machine_bytes)
        return all(limit is None or memory_bytes <= limit for limit in limits)


@dataclass(frozen=True, slots=True)
class FunctionDemand:
    """Desired replicas of one function; raises PlanError if a number is negative.

    Attributes:
        function: the function's id.
        replicas: the autoscaler's decision.
        memory_bytes: memory of one replica.
        anti_affinity_key: functions with the same key are called at the same time, so they are
            placed in different sandboxes if that needs no additional sandbox; empty for none.
        last_used: time of its last call or of the last request that waited for it.
        pinned: whether it is never evicted for another function.
    """

    function: str
    replicas: int
    memory_bytes: int = 0
    anti_affinity_key: str = ""
    last_used: float = 0.0
    pinned: bool = False

    def __post_init__(self) -> None:
        """Validate the numbers."""
        _check_minimum("replicas", self.replicas, minimum=0)
        _check_minimum("memory_bytes", self.memory_bytes, minimum=0)


class SandboxState(Enum):
    """Lifecycle state of a sandbox.

    An unresponsive sandbox stays READY until its observer marks it as FAILED. Then its functions do
    not count as replicas any more, and the plan deletes it. DRAINING means that its deletion is in
    progress.
    """

    STARTING = "Starting"
    READY = "Ready"
    FAILED = "Failed"
    DRAINING = "Draining"


class AssignmentState(Enum):
    """State of a function in a sandbox."""

    ATTACHING = "Attaching"
    ATTACHED = "Attached"
    DETACHING = "Detaching"


@dataclass(frozen=True, slots=True)
class Assignment:
    """One function in one sandbox.

    Attributes:
        function: the function's id.
        state: its state; only an ATTACHED function can be called.
        memory_bytes: memory that it uses until it is detached.
        last_used: time of its last call.
        anti_affinity_key: see `FunctionDemand`.
    """

    function: str
    state: AssignmentState = AssignmentState.ATTACHED
    memory_bytes: int = 0
    last_used: float = 0.0
    anti_affinity_key: str = ""


@dataclass(frozen=True, slots=True)
class ObservedSandbox:
    """One sandbox.

    Attributes:
        id: its id on the platform.
        state: its lifecycle state.
        template_hash: digest of the template that it was created from.
        created_at: when it was created, on the same clock as the plan's `now`.
        assignments: the functions in it, each at most once.
        shape: what it can hold if that differs from the settings; else None.
    """

    id: str
    state: SandboxState
    template_hash: str
    created_at: float = 0.0
    assignments: tuple[Assignment, ...] = ()
    shape: SandboxShape | None = None

    @property
    def age_key(self) -> tuple[float, str]:
        """Sort key: oldest first, ties by id."""
        return (self.created_at, self.id)


@dataclass(frozen=True, slots=True)
class Replica:
    """An assignment together with its sandbox."""

    sandbox: ObservedSandbox
    assignment: Assignment

    @property
    def key(self) -> tuple[str, str]:
        """The ids of sandbox and function, which identify the replica."""
        return (self.sandbox.id, self.assignment.function)

    @property
    def is_serving(self) -> bool:
        """Whether it can be called."""
        return self.assignment.state is AssignmentState.ATTACHED


def live_replicas(sandboxes: Iterable[ObservedSandbox]) -> Mapping[str, list[Replica]]:
    """Return each function's replicas that are not being detached, oldest sandbox first."""
    live: dict[str, list[Replica]] = {}
    for sandbox in sorted(sandboxes, key=lambda s: s.age_key):
        for assignment in sandbox.assignments:
            if assignment.state is not AssignmentState.DETACHING:
                live.setdefault(assignment.function, []).append(Replica(sandbox, assignment))
    return live
