"""Memory limit of all functions together: admission of missing replicas and LRU eviction.

For a device that several sandboxes share and that cannot hold the whole model. A missing replica
gets free memory first. If there is none, functions that were used less recently are evicted, least
recently used first, but none that is in use. If all are in use, the missing replica waits, so that
functions do not evict each other in turns. An evicted function's memory counts as used until it is
detached, so a replica is attached only once its memory is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from faasmoe_operator.plan.actions import ActionReason, Detach
from faasmoe_operator.plan.fleet import FleetSettings, FunctionDemand, ObservedSandbox, Replica


class MemoryBudget:
    """The memory budget of one reconcile pass.

    Args:
        settings: the memory limit and the minimum idle time of evicted functions.
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
        self._limit_bytes = settings.memory_limit_bytes
        self._evictable_before = now - settings.evict_idle_s
        self._used_bytes = sum(a.memory_bytes for s in sandboxes for a in s.assignments)
        replicas = [replica for found in retained.values() for replica in found]
        self._planned_bytes = sum(replica.assignment.memory_bytes for replica in replicas)
        self._eviction_candidates = sorted(
            (r for r in replicas if r.is_serving and self._is_evictable(r, demands)), key=_lru_key
        )
        self.evictions: list[Detach] = []
        """Detaches of evicted functions."""
        self.waiting_functions: dict[str, None] = {}
        """Functions that wait for memory, in order."""

    def admit(self, demand: FunctionDemand) -> bool:
        """Return whether a missing replica may be placed now; plans evictions if it needs any."""
        if self._limit_bytes is None:
            return True
        if not self._plan_evictions(demand):
            self.waiting_functions[demand.function] = None
            return False
        self._planned_bytes += demand.memory_bytes
        if self._used_bytes + demand.memory_bytes > self._limit_bytes:
            return False  # the evicted functions are not detached yet
        self._used_bytes += demand.memory_bytes
        return True

    def _plan_evictions(self, demand: FunctionDemand) -> bool:
        """Plan the evictions that a replica needs; return False if there are too few candidates."""
        assert self._limit_bytes is not None
        missing_bytes = self._planned_bytes + demand.memory_bytes - self._limit_bytes
        evicted: list[Replica] = []
        for replica in self._eviction_candidates:
            if missing_bytes <= 0:
                break
            if self._can_evict_for(replica, demand):
                evicted.append(replica)
                missing_bytes -= replica.assignment.memory_bytes
        if missing_bytes > 0:
            return False
        for replica in evicted:
            self._eviction_candidates.remove(replica)
            self._planned_bytes -= replica.assignment.memory_bytes
            self.evictions.append(Detach(*replica.key, ActionReason.MEMORY))
        return True

    def _is_evictable(self, replica: Replica, demands: Mapping[str, FunctionDemand]) -> bool:
        demand = demands.get(replica.assignment.function)
        return demand is None or not demand.pinned

    def _can_evict_for(self, replica: Replica, demand: FunctionDemand) -> bool:
        last_used = replica.assignment.last_used
        is_other = replica.assignment.function != demand.function
        return is_other and last_used < demand.last_used and last_used <= self._evictable_before


def _lru_key(replica: Replica) -> tuple[float, tuple[str, str]]:
    return (replica.assignment.last_used, replica.key)
