"""The memory limit over all models of a machine: who holds what, and who makes room for whom.

Each model's controller plans its own functions (`plan/sandboxes.py`) and sees what the others hold;
the launcher reports its routers and asks which of them may run (`plan/router_memory.py`). This
module only keeps what they last said, and hands evictions to whom they concern.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from faasmoe_operator.plan.fleet import MachineMemory, MemoryClaim, MemoryHolder
from faasmoe_operator.plan.router_memory import RouterMemory, plan_routers

logger = logging.getLogger(__name__)


class MemoryMember(Protocol):
    """A model's controller, as the others' evictions need it."""

    def memory_holders(self) -> list[MemoryHolder]:
        """Return what the model's functions hold."""

    def evict(self, holder: MemoryHolder) -> None:
        """Detach a function to make room for another model or a router."""

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


class MemoryPool:
    """The memory of a machine that all its models and routers share.

    Args:
        limit_bytes: memory of all functions and routers together.
        clock: monotonic time in seconds.
    """

    def __init__(self, limit_bytes: int, *, clock: Callable[[], float]) -> None:
        self.limit_bytes = limit_bytes
        self._clock = clock
        self._members: dict[str, MemoryMember] = {}
        self._claims: dict[str, tuple[MemoryClaim, ...]] = {}
        self._routers: dict[str, RouterMemory] = {}
        self._router_claims: tuple[MemoryClaim, ...] = ()
        self._evicted_routers: set[str] = set()
        self._larger_routers: set[str] = set()
        self._held_bytes = 0

    def join(self, model: str, member: MemoryMember) -> None:
        """Add a model's controller, or replace it by the one that was started after it."""
        self._members[model] = member

    def shared_by(self, model: str) -> SharedMemory:
        """Return a model's part."""
        return SharedMemory(model, self)

    def view(self, model: str) -> MachineMemory:
        """Return the memory as one model sees it."""
        claims = (c for name, found in self._claims.items() if name != model for c in found)
        return MachineMemory(
            self.limit_bytes,
            (*self._router_holders(), *self._function_holders(without=model)),
            (*claims, *self._router_claims),
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
        self._routers = {}
        for router in routers:
            self._routers[router.name] = router.within(self.limit_bytes)
            self._warn_if_larger(router)
        running = {name for name, router in self._routers.items() if router.is_running}
        self._evicted_routers &= running
        observed = [
            replace(r, is_wanted=r.is_wanted and r.name not in self._evicted_routers)
            if r.is_running
            else r
            for r in self._routers.values()
        ]
        plan = plan_routers(
            self.limit_bytes,
            observed,
            functions=self._function_holders(),
            claims=[claim for claims in self._claims.values() for claim in claims],
            now=self._clock(),
        )
        self._router_claims = plan.claims
        self._evicted_routers |= {r.name for r in observed if r.is_running} - plan.may_run
        for name in plan.may_run:  # it holds its memory from now on
            self._routers[name] = replace(self._routers[name], is_running=True)
        self._evict(plan.evicted)
        self._notify_if_free()
        return plan.may_run

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
        for holder in holders:
            if not holder.key[0]:
                self._evicted_routers.add(holder.name)
                continue
            for member in self._members.values():
                if any(own.key == holder.key for own in member.memory_holders()):
                    member.evict(holder)

    def _notify_if_free(self, *, without: str = "") -> None:
        """Let models that wait plan anew once somebody has left."""
        holders = (*self._router_holders(), *self._function_holders())
        before, self._held_bytes = self._held_bytes, sum(h.size_bytes for h in holders)
        if self._held_bytes >= before:
            return
        for model, claims in self._claims.items():
            if claims and model != without:
                self._members[model].request_reconcile()

    def _function_holders(self, *, without: str = "") -> list[MemoryHolder]:
        """Return the functions of models; those of one whose routers are idle are idle as well."""
        found: list[MemoryHolder] = []
        for model, member in self._members.items():
            if model == without:
                continue
            holders, idle_since = member.memory_holders(), self._idle_since(model)
            if idle_since is not None:
                holders = [
                    replace(h, is_idle=True, last_used=min(h.last_used, idle_since))
                    for h in holders
                ]
            found += holders
        return found

    def _idle_since(self, model: str) -> float | None:
        """Return when a model last had a request; None if it has one, or that is not known."""
        now, prefix = self._clock(), f"{model}/"
        routers = [r for r in self._routers.values() if r.name.startswith(prefix)]
        if not routers or not all(router.is_idle(now) for router in routers):
            return None
        return max(router.last_used for router in routers)

    def _router_holders(self) -> list[MemoryHolder]:
        now = self._clock()
        holders = {r.name: r.holder(now) for r in self._routers.values() if r.is_running}
        return [
            replace(holder, is_leaving=True) if name in self._evicted_routers else holder
            for name, holder in holders.items()
        ]
