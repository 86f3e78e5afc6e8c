"""Which of several operators looks after the models: the one that holds a Lease.

Whether a lease has run out is told by our own clock, from when we saw it renewed last: the clocks
of two nodes differ. Writes carry the version that was read: of two that take it one is refused.
An operator that loses its lease ends, as it could undo what the next one does; one that ends gives
it back, so that the next need not wait.

The library's own election is not used: its lock of 37.0 cannot create a lease (it passes the API a
value of a type that the API refuses).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from faasmoe_operator.errors import FaasmoeError
from faasmoe_operator.kube.client import KubeApi
from faasmoe_operator.kube.errors import KubeApiError
from faasmoe_operator.kube.types import LEASE, Object

logger = logging.getLogger(__name__)

LEASE_NAME = "faasmoe-operator"
LEASE_DURATION_S = 30
RENEW_DEADLINE_S = 20.0
RETRY_PERIOD_S = 5.0
RELEASE_TIMEOUT_S = 2.0


class LeadershipLost(FaasmoeError):
    """Another operator may lead now."""


class LeaderElector:
    """One operator's part in it.

    Args:
        api: the API server.
        namespace: where the lease is.
        identity: name of this operator, unique among all.
        clock: a clock that only goes forward.
        wall: the day's clock, in seconds.
    """

    def __init__(
        self,
        api: KubeApi,
        *,
        namespace: str,
        identity: str,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._api, self._namespace, self._identity = api, namespace, identity
        self._clock, self._wall_clock = clock, wall_clock
        self._observed_version = ""
        self._observed_at = 0.0

    async def try_acquire_or_renew(self) -> bool:
        """Take or renew the lease if that may be; return whether this operator holds it."""
        try:
            lease = await self._api.get(LEASE, self._namespace, LEASE_NAME)
            if lease is None:
                await self._api.create(LEASE, self._lease_object(None, self._identity))
            elif not self._can_acquire(lease):
                return False
            else:
                await self._api.apply(LEASE, self._lease_object(lease, self._identity))
        except KubeApiError as error:
            logger.info("lease not acquired: %s", error)
            return False
        return True

    async def release(self) -> None:
        """Give the lease back, if it is ours."""
        try:
            async with asyncio.timeout(RELEASE_TIMEOUT_S):
                lease = await self._api.get(LEASE, self._namespace, LEASE_NAME)
                if lease is not None and _holder_identity(lease) == self._identity:
                    await self._api.apply(LEASE, self._lease_object(lease, ""))
        except (KubeApiError, TimeoutError) as error:
            logger.warning("lease not released: %s", error)

    def _can_acquire(self, lease: Object) -> bool:
        """Return whether a lease is ours, nobody's, or has run out."""
        version = lease["metadata"]["resourceVersion"]
        if version != self._observed_version:
            self._observed_version, self._observed_at = version, self._clock()
        if _holder_identity(lease) in (self._identity, ""):
            return True
        duration_s = lease["spec"].get("leaseDurationSeconds") or LEASE_DURATION_S
        return self._clock() >= self._observed_at + duration_s

    def _lease_object(self, previous: Object | None, holder: str) -> Object:
        now = datetime.fromtimestamp(self._wall_clock(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {} if previous is None else previous["spec"]
        is_renewal = previous is not None and _holder_identity(previous) == holder
        metadata = {"name": LEASE_NAME, "namespace": self._namespace}
        if previous is not None:
            metadata["resourceVersion"] = previous["metadata"]["resourceVersion"]
        return {
            "apiVersion": LEASE.api_version,
            "kind": LEASE.name,
            "metadata": metadata,
            "spec": {
                "holderIdentity": holder,
                "leaseDurationSeconds": LEASE_DURATION_S,
                "acquireTime": spec.get("acquireTime", now) if is_renewal else now,
                "renewTime": now,
                "leaseTransitions": spec.get("leaseTransitions", 0) + (not is_renewal),
            },
        }


@asynccontextmanager
async def hold_leadership(
    elector: LeaderElector, *, retry_s: float = RETRY_PERIOD_S, deadline_s: float = RENEW_DEADLINE_S
) -> AsyncIterator[None]:
    """Wait until this operator leads; ends what is done within if it does no longer.

    Args:
        election: its part in the election.
        retry_s: between two attempts.
        deadline_s: for the lease to be renewed; it lasts longer, so that nobody else leads yet.

    Raises LeadershipLost, in an exception group.
    """
    while True:
        if await elector.try_acquire_or_renew():
            break
        await asyncio.sleep(retry_s)
    logger.info("became leader")
    try:
        async with asyncio.TaskGroup() as group:
            renewal = group.create_task(
                _renew_until_lost(elector, retry_s=retry_s, deadline_s=deadline_s)
            )
            try:
                yield
            finally:
                renewal.cancel()
    finally:
        await elector.release()


async def _renew_until_lost(elector: LeaderElector, *, retry_s: float, deadline_s: float) -> None:
    renewed_at = time.monotonic()
    while True:
        await asyncio.sleep(retry_s)
        if await elector.try_acquire_or_renew():
            renewed_at = time.monotonic()
        elif time.monotonic() >= renewed_at + deadline_s:
            raise LeadershipLost(f"the lease {LEASE_NAME} could not be renewed in {deadline_s:g} s")


def _holder_identity(lease: Object) -> str:
    return lease.get("spec", {}).get("holderIdentity") or ""
