"""Memory limits of functions and routers: admission of what is missing, and eviction by last use.

A limit is that of a model's functions together, for a device that several sandboxes share and that
cannot hold the whole model, or that of a machine over all of its models and routers. What is
missing gets free memory first. If there is none, what was used less recently is evicted, least
recently used first, but nothing that is in use. If all is in use, the missing one waits, so that
two do not evict each other in turns. What is evicted counts as used until it is gone, so that
something takes its place only once its memory is free.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from faasmoe_operator.plan.actions import ActionReason, Detach
from faasmoe_operator.plan.fleet import (
    AssignmentState,
    FleetSettings,
    FunctionDemand,
    MachineMemory,
    MemoryClaim,
    MemoryHolder,
    ObservedSandbox,
    Replica,
    SandboxState,
)


@dataclass(slots=True, eq=False)
class MemoryLimit:
    """A limit, while what is missing is placed.

    Attributes:
        limit_bytes: the limit.
        used_bytes: memory in use, what is leaving included.
        planned_bytes: memory in use once what is leaving has left.
        claims: what others wait for; what was used less recently leaves room for it.
        resident: what takes no memory more, as others hold the same.
    """

    limit_bytes: int
    used_bytes: int
    planned_bytes: int
    claims: tuple[MemoryClaim, ...] = ()
    resident: frozenset[str] = frozenset()
    _summed: tuple[MemoryClaim, ...] | None = field(default=None, init=False)
    _ranks: list[tuple[float, float, str]] = field(default_factory=list, init=False)
    _bytes_from: list[int] = field(default_factory=list, init=False)

    def size_of(self, claim: MemoryClaim) -> int:
        """Return the memory that something would take."""
        return 0 if claim.name in self.resident else claim.size_bytes

    def claimed_bytes(self, claim: MemoryClaim) -> int:
        """Return what others wait for that was used more recently."""
        if self._summed is not self.claims:
            self._sum_claims()
        return self._bytes_from[bisect_right(self._ranks, claim.rank)]

    def _sum_claims(self) -> None:
        """Sum the claims from each rank on, as each of many that are admitted asks for that."""
        ordered = sorted(self.claims, key=lambda claim: claim.rank)
        self._ranks = [claim.rank for claim in ordered]
        sizes = (claim.size_bytes for claim in reversed(ordered))
        self._bytes_from = list(accumulate(sizes, initial=0))[::-1]
        self._summed = self.claims


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """Something that may be evicted.

    Attributes:
        holder: what it is.
        limits: the limits that it counts for.
    """

    holder: MemoryHolder
    limits: tuple[MemoryLimit, ...]


@dataclass(slots=True)
class MemoryAdmission:
    """Admits what is missing, one after the other, and chooses what is evicted for it.

    Attributes:
        limits: all limits; none admits everything.
        candidates: what may be evicted, in any order.
        evictable_before: what was used later is in use.
        evicted: what is evicted.
        claims: what was not admitted yet.
        waiting: of these, those for which too little may be evicted.
    """

    limits: tuple[MemoryLimit, ...]
    candidates: list[Candidate]
    evictable_before: float
    evicted: list[MemoryHolder] = field(default_factory=list)
    claims: list[MemoryClaim] = field(default_factory=list)
    waiting: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Sort the candidates by their last use."""
        self.candidates.sort(key=lambda c: (c.holder.last_used, c.holder.key))

    def admit(self, claim: MemoryClaim) -> bool:
        """Return whether there is memory now; plans evictions if there is not."""
        if not self.limits:
            return True
        evicted = self._find_room(claim)
        if evicted is None:
            self.waiting[claim.name] = None
            self.claims.append(claim)
            return False
        for candidate in evicted:
            self.candidates.remove(candidate)
            self.evicted.append(candidate.holder)
            for limit in candidate.limits:
                limit.planned_bytes -= candidate.holder.size_bytes
        for limit in self.limits:
            limit.planned_bytes += limit.size_of(claim)
        if any(
            limit.used_bytes + limit.size_of(claim) + limit.claimed_bytes(claim) > limit.limit_bytes
            for limit in self.limits
        ):
            self.claims.append(claim)  # what is evicted has not left yet
            return False
        for limit in self.limits:
            limit.used_bytes += limit.size_of(claim)
        return True

    def _find_room(self, claim: MemoryClaim) -> list[Candidate] | None:
        """Return what to evict; None if too little may be evicted."""
        evicted: list[Candidate] = []
        for limit in self.limits:
            missing_bytes = limit.planned_bytes + limit.size_of(claim) + limit.claimed_bytes(claim)
            missing_bytes -= limit.limit_bytes
            missing_bytes -= sum(c.holder.size_bytes for c in evicted if limit in c.limits)
            for candidate in self.candidates:
                if missing_bytes <= 0:
                    break
                if limit in candidate.limits and candidate not in evicted:
                    if not self._can_evict_for(candidate.holder, claim):
                        continue
                    evicted.append(candidate)
                    missing_bytes -= candidate.holder.size_bytes
            if missing_bytes > 0:
                return None
        return evicted

    def _can_evict_for(self, holder: MemoryHolder, claim: MemoryClaim) -> bool:
        is_in_use = not holder.is_idle and holder.last_used > self.evictable_before
        is_other = holder.name != claim.name
        return is_other and not is_in_use and holder.last_used < claim.last_used


class MemoryBudget:
    """The memory budget of one reconcile pass.

    Args:
        settings: the memory limits and the minimum idle time of evicted functions.
        sandboxes: all sandboxes, including terminating ones, whose memory is not free yet.
        retained: replicas by function that the plan does not detach.
        demands: every function of the plan, by id.
        now: current time, on the same clock as `last_used`.
    """

    def __init__(
        self,
        settings: FleetSettings,
        *,
        sandboxes: Iterable[ObservedSandbox],
        retained: Mapping[str, Sequence[Replica]],
        demands: Mapping[str, FunctionDemand],
        now: float,
    ) -> None:
        replicas = [replica for found in retained.values() for replica in found]
        used_bytes = sum(a.memory_bytes for s in sandboxes for a in s.assignments)
        planned_bytes = sum(replica.assignment.memory_bytes for replica in replicas)
        limits = []
        if settings.memory_limit_bytes is not None:
            limits.append(MemoryLimit(settings.memory_limit_bytes, used_bytes, planned_bytes))
        others: tuple[MemoryHolder, ...] = ()
        if (machine := settings.machine) is not None:
            others = machine.others
            limits.append(machine_limit(machine, used_bytes, planned_bytes))
        candidates = [
            Candidate(_holder(replica), tuple(limits))
            for replica in replicas
            if replica.is_serving and _is_evictable(replica, demands)
        ]
        candidates += [Candidate(o, tuple(limits[-1:])) for o in others if o.is_evictable]
        self._admission = MemoryAdmission(tuple(limits), candidates, now - settings.evict_idle_s)
        self._own = {replica.key for replica in replicas}
        self._is_shared = settings.machine is not None

    @property
    def evictions(self) -> list[Detach]:
        """Detaches of evicted functions of the model itself."""
        return [
            Detach(sandbox, function, ActionReason.MEMORY)
            for sandbox, function in (holder.key for holder in self._admission.evicted)
            if (sandbox, function) in self._own
        ]

    @property
    def evicted_elsewhere(self) -> list[MemoryHolder]:
        """What is evicted that is not the model's."""
        return [holder for holder in self._admission.evicted if holder.key not in self._own]

    @property
    def waiting_functions(self) -> list[str]:
        """Functions that wait for memory, in order."""
        return list(self._admission.waiting)

    @property
    def claims(self) -> list[MemoryClaim]:
        """What is missing and has no memory of the machine yet."""
        return self._admission.claims if self._is_shared else []

    def admit(self, demand: FunctionDemand) -> bool:
        """Return whether a missing replica may be placed now; plans evictions if it needs any."""
        claim = MemoryClaim(demand.function, demand.memory_bytes, demand.last_used)
        return self._admission.admit(claim)


def machine_limit(
    machine: MachineMemory, used_bytes: int = 0, planned_bytes: int = 0
) -> MemoryLimit:
    """Return the limit of a machine, of which a model's functions use some already."""
    others = machine.others

    def own_bytes(size_bytes: int) -> int:
        return max(0, size_bytes + machine.own_extra_bytes)

    return MemoryLimit(
        machine.limit_bytes,
        own_bytes(used_bytes) + sum(holder.size_bytes for holder in others),
        own_bytes(planned_bytes) + sum(h.size_bytes for h in others if not h.is_leaving),
        machine.claims,
        machine.resident,
    )


def function_holders(
    sandboxes: Iterable[ObservedSandbox], *, pinned: Iterable[str]
) -> list[MemoryHolder]:
    """Return the functions in sandboxes as others see them, who may evict them.

    Args:
        sandboxes: a model's sandboxes.
        pinned: its functions that are never evicted.
    """
    kept = frozenset(pinned)
    return [
        MemoryHolder(
            (sandbox.id, assignment.function),
            assignment.memory_bytes,
            assignment.last_used,
            is_evictable=assignment.state is AssignmentState.ATTACHED
            and sandbox.state is not SandboxState.DRAINING
            and assignment.function not in kept,
            is_leaving=assignment.state is AssignmentState.DETACHING
            or sandbox.state is SandboxState.DRAINING,
            is_pinned=assignment.function in kept,
        )
        for sandbox in sandboxes
        for assignment in sandbox.assignments
    ]


def _holder(replica: Replica) -> MemoryHolder:
    assignment = replica.assignment
    return MemoryHolder(replica.key, assignment.memory_bytes, assignment.last_used)


def _is_evictable(replica: Replica, demands: Mapping[str, FunctionDemand]) -> bool:
    demand = demands.get(replica.assignment.function)
    return demand is None or not demand.pinned
