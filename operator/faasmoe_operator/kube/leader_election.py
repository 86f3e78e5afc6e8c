"""Leader election by a Lease, so that only one of several operators reconciles.

Expiry is measured with the local monotonic clock from when the lease was last seen to change, since
clocks of nodes differ. Writes carry the resourceVersion that was read, so that of two candidates
one gets a conflict. An operator that loses the lease exits, as it could undo the next leader's
work; one that shuts down releases it, so that the next need not wait.

The kubernetes library's election is not used: the LeaseLock of version 37.0 cannot create a lease
(it passes a value of a type that the API rejects).
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
    """The lease was not renewed in time; another operator may lead now."""


class LeaderElector:
    """A candidate in the election.

    Args:
        api: the API server.
        namespace: namespace of the Lease.
        identity: unique name of this process.
        clock: monotonic clock, in seconds.
        wall_clock: Unix time, in seconds.
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
        """Acquire or renew the lease if possible; return whether this operator holds it."""
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
        """Release the lease if this operator holds it."""
        try:
            async with asyncio.timeout(RELEASE_TIMEOUT_S):
                lease = await self._api.get(LEASE, self._namespace, LEASE_NAME)
                if lease is not None and _holder_identity(lease) == self._identity:
                    await self._api.apply(LEASE, self._lease_object(lease, ""))
        except (KubeApiError, TimeoutError) as error:
            logger.warning("lease not released: %s", error)

    def _can_acquire(self, lease: Object) -> bool:
        """Return whether the lease is held by this operator, by none, or has expired."""
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
    """Wait until this operator leads, and cancel the body if it loses leadership.

    Args:
        elector: the candidate.
        retry_s: interval between attempts, in seconds.
        deadline_s: time within which the lease must be renewed, in seconds. The lease lasts
            longer, so that no other operator leads when the body is cancelled.

    Raises:
        ExceptionGroup: with LeadershipLost.
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
