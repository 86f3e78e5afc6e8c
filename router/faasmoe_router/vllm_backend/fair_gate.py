"""The places of vLLM's batch, shared fairly by tenants: the asynchronous side of `FairQueue`.

vLLM is given no more requests than its batch takes, so the order in which tenants are served is
decided here. What is beyond a tenant's share is not preempted: vLLM has no way to hold a request.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager

from faasmoe_router.engine.fair_queue import FairQueue, Share
from faasmoe_router.errors import EngineQueueFull

CACHE_GROUP_PREFIX = "faasmoe-group:"
MAX_PRIORITY = 1 << 62


class FairGate:
    """Gives requests a place in vLLM's batch, tenant by tenant; used on the event loop only.

    A request takes one place, however many choices it has.

    Args:
        slots: requests that run at once.
        max_waiting: requests that wait for a place.
    """

    def __init__(self, *, slots: int, max_waiting: int) -> None:
        self._slots = slots
        self._max_waiting = max_waiting
        self._queue = FairQueue(slots=slots, max_queued=max_waiting)
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._groups: Mapping[str, str] | None = None
        self._computed: Counter[str] = Counter()
        self._is_paused = False
        self.last_active_s = float("-inf")

    @property
    def n_requests(self) -> int:
        """Requests that run or wait."""
        return self._queue.n_running + self._queue.n_waiting

    def set_tenants(self, shares: Mapping[str, Share], prefix_groups: Mapping[str, str]) -> None:
        """Set the tenants' shares, and the groups that share cached prefixes."""
        self._queue.set_shares(shares)
        self._groups = dict(prefix_groups)

    def sequence_counts(self, tenant: str) -> tuple[int, int]:
        """Return how many requests of a tenant run and wait."""
        return self._queue.sequence_counts(tenant)

    def check_capacity(self, tenant: str) -> None:
        """Raise EngineQueueFull or TenantQueueFull if no further request may wait."""
        if self.n_requests >= self._slots + self._max_waiting:
            raise EngineQueueFull(
                f"{self.n_requests} requests are queued or running, at most "
                f"{self._slots + self._max_waiting} may be"
            )
        self._queue.check_capacity(tenant, 1)

    def cache_salt(self, tenant: str, own_salt: str | None) -> str | None:
        """Return the salt of a request's cached prefixes.

        Args:
            tenant: its tenant; one of no group shares with itself only.
            own_salt: the salt that the request brings; shares with the same salt of its group only.
        """
        if self._groups is None:
            return own_salt
        group = self._groups.get(tenant)
        scope = f"tenant:{tenant}" if group is None else CACHE_GROUP_PREFIX + group
        return scope if own_salt is None else f"{scope}\n{own_salt}"

    def priority(self, tenant: str) -> int:
        """Return vLLM's priority of a tenant's next request: its virtual time; lower runs first."""
        return min(MAX_PRIORITY, int(self._queue.virtual_counter(tenant)))

    @asynccontextmanager
    async def place(
        self, tenant: str, request_id: str, *, n_prompt_tokens: int, priority: int
    ) -> AsyncIterator[None]:
        """Wait for a place and hold it for the lifetime of the context.

        Args:
            tenant: the request's tenant.
            request_id: its id, unique.
            n_prompt_tokens: tokens of its prompt.
            priority: its position among those of its tenant; lower runs earlier.
        """
        place = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = place
        self._queue.push(tenant, request_id, n_prompt_tokens=n_prompt_tokens, priority=priority)
        self._start_next()
        try:
            await place
            yield
        finally:
            self._waiting.pop(request_id, None)
            self._queue.remove(request_id)
            self._start_next()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Give no places for the lifetime of the context; requests wait meanwhile."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False
            self._start_next()

    def charge(self, tenant: str, request_id: str, *, n_computed: int, n_generated: int) -> None:
        """Charge a request for tokens.

        Args:
            tenant: its tenant.
            request_id: the request.
            n_computed: tokens that vLLM computed, of the prompt or generated.
            n_generated: those of them that were generated.
        """
        self._queue.charge(request_id, n_generated)
        self._computed[tenant] += n_computed
        self.last_active_s = time.monotonic()

    def drain_computed(self) -> Mapping[str, int]:
        """Return the tokens computed for each tenant since the last call."""
        drained, self._computed = self._computed, Counter()
        return drained

    def _start_next(self) -> None:
        while not self._is_paused and (request_id := self._queue.pop()) is not None:
            place = self._waiting[request_id]
            if not place.done():
                place.set_result(None)
