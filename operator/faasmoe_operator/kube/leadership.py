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
from faasmoe_operator.kube.api import KubeApi
from faasmoe_operator.kube.errors import ApiError
from faasmoe_operator.kube.kinds import LEASE, Object

logger = logging.getLogger(__name__)

LEASE_NAME = "faasmoe-operator"
LEASE_S = 30
RENEW_DEADLINE_S = 20.0
RETRY_S = 5.0
RELEASE_TIMEOUT_S = 2.0


class LeadershipLost(FaasmoeError):
    """Another operator may lead now."""


class Election:
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
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._api, self._namespace, self._identity = api, namespace, identity
        self._clock, self._wall = clock, wall
        self._seen_version = ""
        self._seen_at = 0.0

    async def attempt(self) -> bool:
        """Take or renew the lease if that may be; return whether this operator holds it."""
        try:
            found = await self._api.get(LEASE, self._namespace, LEASE_NAME)
            if found is None:
                await self._api.create(LEASE, self._lease(None, self._identity))
            elif not self._may_take(found):
                return False
            else:
                await self._api.apply(LEASE, self._lease(found, self._identity))
        except ApiError as error:
            logger.info("the lease is not taken: %s", error)
            return False
        return True

    async def release(self) -> None:
        """Give the lease back, if it is ours."""
        try:
            async with asyncio.timeout(RELEASE_TIMEOUT_S):
                found = await self._api.get(LEASE, self._namespace, LEASE_NAME)
                if found is not None and _holder(found) == self._identity:
                    await self._api.apply(LEASE, self._lease(found, ""))
        except (ApiError, TimeoutError) as error:
            logger.warning("the lease is not given back: %s", error)

    def _may_take(self, found: Object) -> bool:
        """Return whether a lease is ours, nobody's, or has run out."""
        version = found["metadata"]["resourceVersion"]
        if version != self._seen_version:
            self._seen_version, self._seen_at = version, self._clock()
        if _holder(found) in (self._identity, ""):
            return True
        lasts_s = found["spec"].get("leaseDurationSeconds") or LEASE_S
        return self._clock() >= self._seen_at + lasts_s

    def _lease(self, before: Object | None, holder: str) -> Object:
        now = datetime.fromtimestamp(self._wall(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {} if before is None else before["spec"]
        is_same = before is not None and _holder(before) == holder
        metadata = {"name": LEASE_NAME, "namespace": self._namespace}
        if before is not None:
            metadata["resourceVersion"] = before["metadata"]["resourceVersion"]
        return {
            "apiVersion": LEASE.api_version,
            "kind": LEASE.name,
            "metadata": metadata,
            "spec": {
                "holderIdentity": holder,
                "leaseDurationSeconds": LEASE_S,
                "acquireTime": spec.get("acquireTime", now) if is_same else now,
                "renewTime": now,
                "leaseTransitions": spec.get("leaseTransitions", 0) + (not is_same),
            },
        }


@asynccontextmanager
async def leading(
    election: Election, *, retry_s: float = RETRY_S, deadline_s: float = RENEW_DEADLINE_S
) -> AsyncIterator[None]:
    """Wait until this operator leads; ends what is done within if it does no longer.

    Args:
        election: its part in the election.
        retry_s: between two attempts.
        deadline_s: for the lease to be renewed; it lasts longer, so that nobody else leads yet.

    Raises LeadershipLost, in an exception group.
    """
    while True:
        if await election.attempt():
            break
        await asyncio.sleep(retry_s)
    logger.info("this operator leads")
    try:
        async with asyncio.TaskGroup() as group:
            keeper = group.create_task(_keep(election, retry_s=retry_s, deadline_s=deadline_s))
            try:
                yield
            finally:
                keeper.cancel()
    finally:
        await election.release()


async def _keep(election: Election, *, retry_s: float, deadline_s: float) -> None:
    renewed_at = time.monotonic()
    while True:
        await asyncio.sleep(retry_s)
        if await election.attempt():
            renewed_at = time.monotonic()
        elif time.monotonic() >= renewed_at + deadline_s:
            raise LeadershipLost(f"the lease {LEASE_NAME} could not be renewed in {deadline_s:g} s")


def _holder(lease: Object) -> str:
    return lease.get("spec", {}).get("holderIdentity") or ""
