"""Which routers of a machine may run within its memory limit. Pure.

Routers and functions share the limit and the rules of `memory_budget`: a router that is wanted gets
free memory, else what was used least recently makes room, else it waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from faasmoe_operator.plan.fleet import EVICT_IDLE_S, MachineMemory, MemoryClaim, MemoryHolder
from faasmoe_operator.plan.memory_budget import Candidate, MemoryAdmission, machine_limit

MAX_SHARE = 0.9  # of a limit that a router counts for at most; the rest is for its functions
ROUTER_IDLE_S = 0.25  # without a request; gateways know of each, so that is no guess


@dataclass(frozen=True, slots=True)
class RouterMemory:
    """A router of the machine.

    Attributes:
        name: its name, unique on the machine.
        size_bytes: memory that it has, or will have.
        last_used: time of the last request that it had or that waited for it.
        is_running: whether it has a process.
        is_wanted: whether it should run.
        is_pinned: whether it runs whatever the limit says.
    """

    name: str
    size_bytes: int
    last_used: float
    is_running: bool
    is_wanted: bool
    is_pinned: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """Its key among all that holds memory."""
        return ("", self.name)

    def is_idle(self, now: float) -> bool:
        """Return whether it has no request, nor had one just now."""
        return now - self.last_used >= ROUTER_IDLE_S

    def holder(self, now: float) -> MemoryHolder:
        """Return what it holds while it runs."""
        return MemoryHolder(
            self.key,
            self.size_bytes,
            self.last_used,
            is_evictable=not self.is_pinned,
            is_leaving=not self.is_wanted,
            is_idle=self.is_idle(now),
        )

    @property
    def claim(self) -> MemoryClaim:
        """What it waits for before it runs."""
        return MemoryClaim(self.name, self.size_bytes, self.last_used)

    def within(self, limit_bytes: int) -> RouterMemory:
        """Return it as it counts for a limit: one that is larger runs alone with its functions."""
        return replace(self, size_bytes=min(self.size_bytes, int(MAX_SHARE * limit_bytes)))


@dataclass(frozen=True, slots=True)
class RouterPlan:
    """What happens to routers.

    Attributes:
        may_run: the routers that may go on or start.
        claims: those that wait for memory.
        evicted: functions that make room.
    """

    may_run: frozenset[str]
    claims: tuple[MemoryClaim, ...] = ()
    evicted: tuple[MemoryHolder, ...] = ()


def plan_routers(
    limit_bytes: int,
    routers: Iterable[RouterMemory],
    *,
    functions: Iterable[MemoryHolder],
    claims: Iterable[MemoryClaim] = (),
    now: float,
) -> RouterPlan:
    """Plan which routers run.

    Args:
        limit_bytes: memory of all functions and routers together.
        routers: all routers.
        functions: the functions of all models.
        claims: functions that wait for memory.
        now: current time, on the same clock as `last_used`.
    """
    routers = [router.within(limit_bytes) for router in routers]
    running = [router for router in routers if router.is_running]
    holders = (*(r.holder(now) for r in running), *functions)
    limit = machine_limit(MachineMemory(limit_bytes, holders, tuple(claims)))
    candidates = [Candidate(holder, (limit,)) for holder in holders if _may_leave(holder)]
    admission = MemoryAdmission((limit,), candidates, now - EVICT_IDLE_S)
    missing = [r for r in routers if r.is_wanted and not r.is_running]
    admitted = {r.name for r in missing if r.is_pinned}
    for router in sorted(missing, key=lambda r: (-r.last_used, r.name)):
        if not router.is_pinned and admission.admit(router.claim):
            admitted.add(router.name)
    evicted = {holder.key for holder in admission.evicted}
    kept = {r.name for r in running if r.is_wanted and r.key not in evicted}
    return RouterPlan(
        frozenset(admitted | kept),
        tuple(admission.claims),
        tuple(holder for holder in admission.evicted if holder.key[0]),
    )


def _may_leave(holder: MemoryHolder) -> bool:
    return holder.is_evictable and not holder.is_leaving
