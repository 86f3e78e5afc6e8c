"""What the sandbox plan starts from: the fleet as it should be, and the sandboxes as observed.

An action that was begun shows here before it is done, as a sandbox that starts or drains, or a
function that is being attached or detached. So planning twice plans nothing twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum

from faasmoe_operator.errors import PlanError


def _check_minimum(field: str, value: int, *, minimum: int) -> None:
    if value < minimum:
        raise PlanError(f"{field}: got {value}, expected at least {minimum}")


@dataclass(frozen=True, slots=True)
class SandboxShape:
    """What one sandbox can take.

    Attributes:
        capacity: functions at most.
        memory_limit_bytes: memory for functions, all together; None for no limit.
    """

    capacity: int = 1
    memory_limit_bytes: int | None = None

    def __post_init__(self) -> None:
        """Refuse a sandbox that could take nothing."""
        _check_minimum("capacity", self.capacity, minimum=1)
        if self.memory_limit_bytes is not None:
            _check_minimum("memory_limit_bytes", self.memory_limit_bytes, minimum=1)

    def fits(self, memory_bytes: int) -> bool:
        """Return whether an empty sandbox can take a function of this size."""
        return self.memory_limit_bytes is None or memory_bytes <= self.memory_limit_bytes


@dataclass(frozen=True, slots=True)
class FleetSettings:
    """How the sandboxes of one model should be.

    Attributes:
        template_hash: of the template that new sandboxes are created from.
        warm_pool: generic sandboxes that are kept ready beyond those in use.
        shape: what one sandbox can take.
        max_creates: sandboxes created in one round at most; 0 while creation is backed off.
        max_surge: replacements under way at once while a template changes.
        start_deadline_s: how long a sandbox may take to become ready.
        memory_limit_bytes: for the functions of all sandboxes together; None for no limit.
        evict_idle_s: how long a function that makes room for another was not used.
    """

    template_hash: str
    warm_pool: int = 1
    shape: SandboxShape = SandboxShape()
    max_creates: int = 8
    max_surge: int = 1
    start_deadline_s: float = 600.0
    memory_limit_bytes: int | None = None
    evict_idle_s: float = 2.0

    def __post_init__(self) -> None:
        """Refuse numbers that no fleet could have."""
        if self.memory_limit_bytes is not None:
            _check_minimum("memory_limit_bytes", self.memory_limit_bytes, minimum=1)
        _check_minimum("warm_pool", self.warm_pool, minimum=0)
        _check_minimum("max_creates", self.max_creates, minimum=0)
        _check_minimum("max_surge", self.max_surge, minimum=1)
        if not self.start_deadline_s > 0:
            raise PlanError(f"start_deadline_s: got {self.start_deadline_s}, expected more than 0")

    def fits_memory_limit(self, memory_bytes: int) -> bool:
        """Return whether the limit of all together leaves room for a function of this size."""
        return self.memory_limit_bytes is None or memory_bytes <= self.memory_limit_bytes


@dataclass(frozen=True, slots=True)
class FunctionDemand:
    """How many replicas one function should have.

    Attributes:
        function: the function's id.
        replicas: the autoscaler's decision.
        memory_bytes: memory that one replica takes of a sandbox's limit.
        apart: functions of the same key are called at the same time, so they are put into different
            sandboxes where that costs no further sandbox; empty if it does not matter.
        last_used: time of its last call, or of one that waits for it.
        pinned: it makes room for no other.
    """

    function: str
    replicas: int
    memory_bytes: int = 0
    anti_affinity_key: str = ""
    last_used: float = 0.0
    pinned: bool = False

    def __post_init__(self) -> None:
        """Refuse less than nothing."""
        _check_minimum("replicas", self.replicas, minimum=0)
        _check_minimum("memory_bytes", self.memory_bytes, minimum=0)


class SandboxState(Enum):
    """Where a sandbox is in its life.

    A sandbox that was ready and does not answer stays READY until whoever observes it gives it up;
    then it is FAILED: its replicas count no more, and the plan deletes it. DRAINING is one whose
    deletion is under way.
    """

    STARTING = "Starting"
    READY = "Ready"
    FAILED = "Failed"
    DRAINING = "Draining"


class AssignmentState(Enum):
    """Where a function is on its way into a sandbox and out of it."""

    ATTACHING = "Attaching"
    ATTACHED = "Attached"
    DETACHING = "Detaching"


@dataclass(frozen=True, slots=True)
class Assignment:
    """One function in one sandbox.

    Attributes:
        function: the function's id.
        state: only one that is ATTACHED serves calls.
        memory_bytes: memory that it takes of the sandbox's limit, until it is gone.
        last_used: time of its last call.
        apart: as in the function's demand.
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
        id: its name on the platform.
        state: where it is in its life.
        template_hash: of the template that it was created from.
        created_at: when it was created, on the clock that the plan's `now` is of.
        assignments: the functions in it; a function at most once.
        shape: what it can take, where an old template differs; None for as the settings say.
    """

    id: str
    state: SandboxState
    template_hash: str
    created_at: float = 0.0
    assignments: tuple[Assignment, ...] = ()
    shape: SandboxShape | None = None

    @property
    def age_key(self) -> tuple[float, str]:
        """Key that sorts the oldest first, ties by id."""
        return (self.created_at, self.id)


@dataclass(frozen=True, slots=True)
class Replica:
    """An assignment together with the sandbox that it is in."""

    sandbox: ObservedSandbox
    assignment: Assignment

    @property
    def key(self) -> tuple[str, str]:
        """The ids of sandbox and function: names the replica."""
        return (self.sandbox.id, self.assignment.function)

    @property
    def is_serving(self) -> bool:
        """Whether calls can go to it."""
        return self.assignment.state is AssignmentState.ATTACHED


def live_replicas(sandboxes: Iterable[ObservedSandbox]) -> Mapping[str, list[Replica]]:
    """Return each function's replicas that serve or soon will, oldest sandbox first."""
    live: dict[str, list[Replica]] = {}
    for sandbox in sorted(sandboxes, key=lambda s: s.age_key):
        for assignment in sandbox.assignments:
            if assignment.state is not AssignmentState.DETACHING:
                live.setdefault(assignment.function, []).append(Replica(sandbox, assignment))
    return live
