"""The memory limit over all models of a machine: who holds what, and who makes room for whom.

Each model's controller plans its own functions (`plan/sandboxes.py`) and sees what the others hold;
the launcher reports its routers and asks which of them may run (`plan/router_memory.py`). This
module only keeps what they last said, and hands evictions to whom they concern.

When a model's first router starts, memory is kept for the functions that it will call, until they
are there. When its last one is to make room, its functions do too, once that router has ended its
last request. If functions of several models that are in use lack memory nevertheless, as they take
more than was expected, those of the model that started first get it, from the others if need be.

What functions of several models map at once counts once (`plan/shared_memory.py`).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from faasmoe_operator.plan.fleet import MachineMemory, MemoryClaim, MemoryHolder
from faasmoe_operator.plan.router_memory import (
    ModelMemory,
    RouterMemory,
    joined_holders,
    model_holders,
    plan_routers,
)
from faasmoe_operator.plan.shared_memory import SharedFunctions

RESERVED_S = 30.0  # at most, for functions that a router will call
IDLE_STEP_S = 0.25  # of when a model was used last, which reports tell within milliseconds
SLOW_START_S = 10.0  # after which a start waits for disks, not for processors

logger = logging.getLogger(__name__)


class MemoryMember(Protocol):
    """A model's functions, as the others' evictions need them."""

    def memory_holders(self) -> Sequence[MemoryHolder]:
        """Return what the model's functions hold; the same object if nothing has changed."""

    def held_bytes(self) -> int:
        """Return how much that is, whether others map the same or not."""

    def missing_bytes(self, resident: Collection[str]) -> int:
        """Return the memory that functions would take that a router will call.

        Args:
            resident: contents that are held already.
        """

    def resident_functions(self, contents: Collection[str]) -> frozenset[str]:
        """Return the functions whose memory is held already, as these contents are."""

    def evict(self, holder: MemoryHolder) -> None:
        """Detach a function to make room for another model or a router."""

    def release(self) -> None:
        """Let all functions go, as the model's last router makes room."""

    def request_reconcile(self) -> None:
        """Plan anew, as memory may have become free."""


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """A model's part in the machine's memory.

    Attributes:
        model: the model's name.
        pool: the memory.
    """

    model: str
    pool: MemoryPool

    def view(self) -> MachineMemory:
        """Return the memory as the model sees it."""
        return self.pool.view(self.model)

    def settle(self, claims: Sequence[MemoryClaim], evicted: Iterable[MemoryHolder]) -> None:
        """Take the result of a plan: what the model waits for, and what is to make room."""
        self.pool.settle(self.model, claims, evicted)


@dataclass(frozen=True, slots=True)
class _Reservation:
    """Memory that is kept for functions of a model whose router has started.

    Attributes:
        size_bytes: what the model's functions may hold.
        until: when it ends if they have not come.
    """

    size_bytes: int
    until: float


@dataclass(frozen=True, slots=True)
class _SeenFunctions:
    """A model's functions as others see them.

    Attributes:
        holders: what the model says.
        state: when it was used last, if it is idle, and whether it makes room.
        seen: what follows.
    """

    holders: Sequence[MemoryHolder]
    state: tuple[float | None, bool]
    seen: Sequence[MemoryHolder]


def _as_seen(
    holders: Sequence[MemoryHolder], idle_since: float | None, is_leaving: bool
) -> Sequence[MemoryHolder]:
    if idle_since is not None:
        holders = [h.changed(is_idle=True, last_used=min(h.last_used, idle_since)) for h in holders]
    return [
        h.changed(is_leaving=True, is_evictable=False) if is_leaving and not h.is_pinned else h
        for h in holders
    ]


class MemoryPool:
    """The memory of a machine that all its models and routers share.

    Args:
        limit_bytes: memory of all functions and routers together.
        clock: monotonic time in seconds.
        max_starting: how many routers start at a time; by default as many as processors.
    """

    def __init__(
        self, limit_bytes: int, *, clock: Callable[[], float], max_starting: int | None = None
    ) -> None:
        self.limit_bytes = limit_bytes
        self._clock = clock
        self._max_starting = max_starting or len(os.sched_getaffinity(0))
        self._members: dict[str, MemoryMember] = {}
        self._claims: dict[str, tuple[MemoryClaim, ...]] = {}
        self._routers: dict[str, RouterMemory] = {}
        self._names: dict[str, list[str]] = {}  # of the routers, by model
        self._started_at: dict[str, float] = {}  # of routers that do not answer yet
        self._turns: dict[str, int] = {}  # of models with routers, ascending
        self._n_turns = 0
        self._router_claims: tuple[MemoryClaim, ...] = ()
        self._reservations: dict[str, _Reservation] = {}
        self._evicted_routers: set[str] = set()
        self._larger_routers: set[str] = set()
        self._held_bytes = 0
        self._seen: dict[str, _SeenFunctions] = {}
        self._shared = SharedFunctions({})

    def join(self, model: str, member: MemoryMember) -> None:
        """Add a model's functions, or replace them by those of a controller that started later."""
        self._members[model] = member

    def shared_by(self, model: str) -> SharedMemory:
        """Return a model's part."""
        return SharedMemory(model, self)

    def view(self, model: str) -> MachineMemory:
        """Return the memory as one model sees it.

        What it waits for while its router runs comes before any router that has not started.
        """
        routers, shared = self._router_holders(), self._shared_functions()
        models = self._models(shared)
        own = models.pop(model, ModelMemory())
        others = [*routers.get(model, ())]
        for name in dict.fromkeys((*routers, *models)):
            if name != model:
                found = models.get(name, ModelMemory())
                functions = self._seen_by(model, name, found.functions)
                others += joined_holders(routers.get(name, ()), functions)
                others += model_holders({name: replace(found, functions=())})
        claims = self._function_claims(of_others_than=model)
        if not own.reserved_bytes and not self._is_in_use(model):
            claims += self._router_claims
        member = self._members.get(model)
        return MachineMemory(
            self.limit_bytes,
            tuple(others),
            tuple(claims),
            shared.extra_bytes(model),
            frozenset() if member is None else member.resident_functions(shared.resident),
        )

    def settle(
        self, model: str, claims: Sequence[MemoryClaim], evicted: Iterable[MemoryHolder]
    ) -> None:
        """Take the result of a model's plan.

        Args:
            model: the model.
            claims: what it waits for.
            evicted: what is to make room for it that is not its own.
        """
        self._claims[model] = tuple(claims)
        self._evict(evicted)
        self._notify_if_free(without=model)

    def update_routers(self, routers: Iterable[RouterMemory]) -> frozenset[str]:
        """Take the state of all routers; return those that may go on or start."""
        now = self._clock()
        self._routers, self._names = {}, {}
        for router in routers:
            self._routers[router.name] = router.within(self.limit_bytes)
            self._names.setdefault(router.model, []).append(router.name)
            self._warn_if_larger(router)
        self._release_functions()
        self._end_reservations(now)
        models = self._models(self._shared_functions())
        plan = plan_routers(
            self.limit_bytes,
            self._observed(now),
            models=models,
            claims=self._function_claims(),
            now=now,
            max_starting=self._max_starting,
        )
        self._router_claims = plan.claims
        running = {name for name, router in self._routers.items() if router.is_running}
        self._evicted_routers |= running - plan.may_run
        for name in plan.may_run - running:  # it holds its memory from now on
            self._start(self._routers[name], models, now)
        self._evict(plan.evicted)
        self._notify_if_free()
        return plan.may_run

    def _seen_by(
        self, model: str, other: str, functions: Sequence[MemoryHolder]
    ) -> Sequence[MemoryHolder]:
        """Return another model's functions as a model may evict them.

        Those of one that is in use and waits for more cannot be called yet. The model that started
        first keeps them, so that two do not take them from each other in turns.
        """
        if not (self._claims.get(other) and self._is_in_use(other)):
            return functions
        if self._turns.get(other, 0) < self._turns.get(model, 0):
            return [holder.changed(is_evictable=False) for holder in functions]
        return [h.changed(is_idle=True, last_used=0.0) for h in functions]

    def _observed(self, now: float) -> list[RouterMemory]:
        """Return the routers as they are planned with: evicted ones are not wanted."""
        observed = []
        for name, router in self._routers.items():
            is_slow = name in self._started_at and now - self._started_at[name] > SLOW_START_S
            is_evicted = router.is_running and name in self._evicted_routers
            observed.append(
                replace(
                    router,
                    is_wanted=router.is_wanted and not is_evicted,
                    is_ready=router.is_ready or is_slow,
                )
            )
        return observed

    def _start(self, router: RouterMemory, models: dict[str, ModelMemory], now: float) -> None:
        """Record that a router starts; the first one of a model brings its functions."""
        is_first = not any(r.is_running for r in self._routers_of(router.model))
        self._routers[router.name] = replace(router, is_running=True)
        self._started_at[router.name] = now
        if is_first:
            self._n_turns += 1
            self._turns[router.model] = self._n_turns
        model = models.get(router.model)
        if model is not None and is_first and not router.is_pinned and model.missing_bytes:
            own_bytes = sum(holder.size_bytes for holder in model.functions)
            room_bytes = max(0, self.limit_bytes - router.size_bytes - own_bytes)
            reserved_bytes = min(model.missing_bytes, room_bytes)
            held_bytes = self._members[router.model].held_bytes()
            self._reservations[router.model] = _Reservation(
                held_bytes + reserved_bytes, now + RESERVED_S
            )

    def _release_functions(self) -> None:
        """Let functions go whose last router was evicted and calls them no more."""
        for name in list(self._evicted_routers):
            router = self._routers.get(name)
            if router is not None and router.is_running and router.is_ready:
                continue  # it still has requests
            model = name.rpartition("/")[0]
            if model in self._members and not self._has_kept_router(model):
                self._members[model].release()
            if router is None or not router.is_running:
                self._evicted_routers.discard(name)

    def _has_kept_router(self, model: str) -> bool:
        return any(
            router.is_running and router.name not in self._evicted_routers
            for router in self._routers_of(model)
        )

    def _routers_of(self, model: str) -> list[RouterMemory]:
        return [self._routers[name] for name in self._names.get(model, ())]

    def _end_reservations(self, now: float) -> None:
        """Forget what has come, and what was kept too long or of a router that has ended."""
        running = {router.model for router in self._routers.values() if router.is_running}
        starting = [n for n, r in self._routers.items() if r.is_running and not r.is_ready]
        self._started_at = {name: self._started_at.get(name, now) for name in starting}
        self._turns = {model: turn for model, turn in self._turns.items() if model in running}
        for model, reservation in list(self._reservations.items()):
            is_over = now > reservation.until or model not in running
            if is_over or not self._reserved_bytes(model):
                del self._reservations[model]

    def _reserved_bytes(self, model: str, resident: Collection[str] = ()) -> int:
        """Return what is kept for functions of a model that are not there yet.

        Args:
            model: the model.
            resident: contents that others hold, for which nothing need be kept.
        """
        reservation = self._reservations.get(model)
        if reservation is None:
            return 0
        member = self._members[model]
        room_bytes = max(0, reservation.size_bytes - member.held_bytes())
        return min(room_bytes, member.missing_bytes(resident))

    def _warn_if_larger(self, router: RouterMemory) -> None:
        if router.size_bytes > self.limit_bytes and router.name not in self._larger_routers:
            self._larger_routers.add(router.name)
            logger.warning(
                "router %s takes %d bytes, the memory limit of all models is %d: it runs alone",
                router.name,
                router.size_bytes,
                self.limit_bytes,
            )

    def _evict(self, holders: Iterable[MemoryHolder]) -> None:
        holders = list(holders)
        self._evicted_routers.update(holder.name for holder in holders if not holder.key[0])
        functions = [holder for holder in holders if holder.key[0]]
        members = self._members.values() if functions else ()
        owners = {own.key: member for member in members for own in member.memory_holders()}
        for holder in functions:
            if holder.key in owners:
                owners[holder.key].evict(holder)

    def _notify_if_free(self, *, without: str = "") -> None:
        """Let models that wait plan anew once somebody has left."""
        held_bytes = sum(r.size_bytes for r in self._routers.values() if r.is_running)
        held_bytes += sum(member.held_bytes() for member in self._members.values())
        held_bytes += sum(map(self._reserved_bytes, self._reservations))
        before, self._held_bytes = self._held_bytes, held_bytes
        if held_bytes >= before:
            return
        for model, claims in self._claims.items():
            if claims and model != without:
                self._members[model].request_reconcile()

    def _models(self, shared: SharedFunctions) -> dict[str, ModelMemory]:
        """Return what models hold beside routers."""
        waiting = {r.model for r in self._routers.values() if r.is_wanted and not r.is_running}
        return {
            model: ModelMemory(
                shared.parts[model],
                member.missing_bytes(shared.resident) if model in waiting else 0,
                self._reserved_bytes(model, shared.resident),
            )
            for model, member in self._members.items()
        }

    def _shared_functions(self) -> SharedFunctions:
        """Return what functions hold, divided between those that map the same."""
        held = {model: self._functions_of(model) for model in self._members}
        before = self._shared.whole
        if held.keys() != before.keys() or any(held[m] is not before[m] for m in held):
            self._shared = SharedFunctions(held, self._shared)
        return self._shared

    def _functions_of(self, model: str) -> Sequence[MemoryHolder]:
        """Return a model's functions; those of one whose routers are idle are idle as well."""
        holders, idle_since = self._members[model].memory_holders(), self._idle_since(model)
        state = (idle_since, self._is_making_room(model))
        seen = self._seen.get(model)
        if seen is None or seen.holders is not holders or seen.state != state:
            seen = self._seen[model] = _SeenFunctions(holders, state, _as_seen(holders, *state))
        return seen.seen

    def _is_making_room(self, model: str) -> bool:
        """Return whether a model's last router was evicted, and its functions with it."""
        is_evicted = any(name.rpartition("/")[0] == model for name in self._evicted_routers)
        return is_evicted and not self._has_kept_router(model)

    def _function_claims(self, *, of_others_than: str | None = None) -> list[MemoryClaim]:
        """Return what functions wait for; those of models in use come before all routers.

        Args:
            of_others_than: a model, beside which claims of models that started later do not count;
                None for all.
        """
        found: list[MemoryClaim] = []
        turn = math.inf if of_others_than is None else self._turns.get(of_others_than, math.inf)
        for model, claims in self._claims.items():
            if not claims or model == of_others_than:
                continue
            if not self._is_in_use(model):
                found += claims
            elif self._turns.get(model, 0) < turn:
                found += [replace(claim, last_used=math.inf) for claim in claims]
        return found

    def _is_in_use(self, model: str) -> bool:
        """Return whether a router of a model runs and has requests."""
        now = self._clock()
        return any(
            router.is_running
            and router.name not in self._evicted_routers
            and not router.is_idle(now)
            for router in self._routers_of(model)
        )

    def _idle_since(self, model: str) -> float | None:
        """Return when a model last had a request; None if it has one, or that is not known."""
        now = self._clock()
        routers = self._routers_of(model)
        if not routers or not all(router.is_idle(now) for router in routers):
            return None
        return math.floor(max(r.last_used for r in routers) / IDLE_STEP_S) * IDLE_STEP_S

    def _router_holders(self) -> dict[str, list[MemoryHolder]]:
        """Return the running routers by model."""
        now = self._clock()
        found: dict[str, list[MemoryHolder]] = {}
        for name, router in self._routers.items():
            if router.is_running:
                holder = router.holder(now)
                if name in self._evicted_routers:
                    holder = holder.changed(is_leaving=True)
                found.setdefault(router.model, []).append(holder)
        return found
