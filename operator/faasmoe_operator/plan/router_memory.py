"""Which routers of a machine may run within its memory limit. Pure.

A model starts and makes room as a whole: its first router gets memory together with the functions
that it will call, and if it makes room, so do they. A router that is wanted gets free memory, else
the model that was used least recently makes room, else it waits: the one whose requests wait
longest is first, and leaves none of its memory to others. Only some start at a time, because
several starts at once take each other's processors, and none of them is ready any sooner.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from faasmoe_operator.plan.fleet import EVICT_IDLE_S, MachineMemory, MemoryClaim, MemoryHolder
from faasmoe_operator.plan.memory_budget import (
    Candidate,
    MemoryAdmission,
    MemoryLimit,
    machine_limit,
)

MAX_SHARE = 0.9  # of a limit that a router counts for at most; the rest is for its functions
ROUTER_IDLE_S = 0.05  # without a request; gateways know of each, so that is no guess


@dataclass(frozen=True, slots=True)
class RouterMemory:
    """A router of the machine.

    Attributes:
        name: its name, unique on the machine: MODEL/INDEX.
        size_bytes: memory that it has, or will have.
        last_used: time of the last request that it had or that waited for it.
        is_running: whether it has a process.
        is_wanted: whether it should run.
        is_pinned: whether it runs whatever the limit says.
        is_ready: whether it answers, and is not ending.
        waiting_since: time since when requests of its model wait for a router.
    """

    name: str
    size_bytes: int
    last_used: float
    is_running: bool
    is_wanted: bool
    is_pinned: bool = False
    is_ready: bool = True
    waiting_since: float = 0.0

    @property
    def model(self) -> str:
        """Its model."""
        return self.name.rpartition("/")[0]

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
            is_pinned=self.is_pinned,
        )

    def claim(self, size_bytes: int) -> MemoryClaim:
        """Return what it waits for before it runs."""
        return MemoryClaim(self.name, size_bytes, self.last_used, self.waiting_since)

    def within(self, limit_bytes: int) -> RouterMemory:
        """Return it as it counts for a limit: one that is larger runs alone with its functions."""
        return replace(self, size_bytes=min(self.size_bytes, int(MAX_SHARE * limit_bytes)))


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """What a model has beside its routers.

    Attributes:
        functions: its functions in sandboxes.
        missing_bytes: those that its first router will call beside them.
        reserved_bytes: of those, what is kept for them, as a router has started.
    """

    functions: tuple[MemoryHolder, ...] = ()
    missing_bytes: int = 0
    reserved_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RouterPlan:
    """What happens to routers.

    Attributes:
        may_run: the routers that may go on or start.
        claims: those that wait for memory.
        evicted: functions that make room, beside those of models whose last router does.
    """

    may_run: frozenset[str]
    claims: tuple[MemoryClaim, ...] = ()
    evicted: tuple[MemoryHolder, ...] = ()


def plan_routers(
    limit_bytes: int,
    routers: Iterable[RouterMemory],
    *,
    models: Mapping[str, ModelMemory],
    claims: Iterable[MemoryClaim] = (),
    now: float,
    max_starting: int,
) -> RouterPlan:
    """Plan which routers run.

    Args:
        limit_bytes: memory of all functions and routers together.
        routers: all routers.
        models: what each model has beside them.
        claims: functions that wait for memory.
        now: current time, on the same clock as `last_used`.
        max_starting: how many routers start at a time.
    """
    routers = [router.within(limit_bytes) for router in routers]
    running = [router for router in routers if router.is_running]
    holders = [*(r.holder(now) for r in running), *model_holders(models)]
    limit = machine_limit(MachineMemory(limit_bytes, tuple(holders), tuple(claims)))
    candidates = list(_candidates(running, models, limit, now))
    admission = MemoryAdmission((limit,), candidates, now - EVICT_IDLE_S)
    missing = [r for r in routers if r.is_wanted and not r.is_running]
    admitted = {r.name for r in missing if r.is_pinned}
    largest_bytes = limit_bytes - sum(h.size_bytes for h in holders if h.is_pinned)
    n_starting = sum(r.is_wanted and not r.is_ready for r in running)
    active = {router.model for router in running}
    for router in sorted((r for r in missing if not r.is_pinned), key=_turn):
        if n_starting >= max_starting:
            break
        model = models.get(router.model, ModelMemory())
        size_bytes = router.size_bytes
        if router.model not in active:
            size_bytes = max(size_bytes, min(size_bytes + model.missing_bytes, largest_bytes))
        claim = router.claim(size_bytes)
        if admission.admit(claim):
            admitted.add(router.name)
        elif claim.name in admission.waiting:
            limit.claims = (*limit.claims, claim)  # what becomes free is not for those after it
            continue
        n_starting += 1
        active.add(router.model)
    evicted = {holder.key for holder in admission.evicted}
    kept = {r.name for r in running if r.is_wanted and r.key not in evicted}
    return RouterPlan(
        frozenset(admitted | kept),
        tuple(admission.claims),
        tuple(holder for holder in admission.evicted if holder.key[0]),
    )


def model_holders(models: Mapping[str, ModelMemory]) -> Iterator[MemoryHolder]:
    """Yield the functions of models, and what is kept for those that will be called soon."""
    for name, model in models.items():
        yield from model.functions
        if model.reserved_bytes:
            yield MemoryHolder(("", name), model.reserved_bytes, 0.0, is_evictable=False)


def _turn(router: RouterMemory) -> tuple[float, float, str]:
    return -router.last_used, router.waiting_since, router.name


def _candidates(
    running: Sequence[RouterMemory],
    models: Mapping[str, ModelMemory],
    limit: MemoryLimit,
    now: float,
) -> Iterator[Candidate]:
    """Yield what may make room: idle models as a whole, functions of others one by one."""
    by_model: dict[str, list[RouterMemory]] = {}
    for router in running:
        by_model.setdefault(router.model, []).append(router)
    for name in dict.fromkeys((*by_model, *models)):
        holders = joined_holders(
            [router.holder(now) for router in by_model.get(name, ())],
            models.get(name, ModelMemory()).functions,
        )
        yield from (Candidate(h, (limit,)) for h in holders if _may_leave(h))


def joined_holders(
    routers: Sequence[MemoryHolder], functions: Iterable[MemoryHolder]
) -> list[MemoryHolder]:
    """Return what a model holds, as one where its only router is idle.

    Its functions make room with that router: without it nobody would call them.
    """
    if len(routers) != 1 or not routers[0].is_idle or not _may_leave(routers[0]):
        return [*routers, *functions]
    joined_bytes, others = routers[0].size_bytes, []
    for function in functions:
        if _may_leave(function):
            joined_bytes += function.size_bytes
        else:
            others.append(function)
    return [routers[0].changed(size_bytes=joined_bytes), *others]


def _may_leave(holder: MemoryHolder) -> bool:
    return holder.is_evictable and not holder.is_leaving
