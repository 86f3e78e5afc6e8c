"""Which of several operators looks after the models: the one that holds a Lease.

An operator that loses its lease ends, as one that goes on could undo what the next one does; it is
started again and waits for its turn.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.leaderelection.electionconfig import Config
from kubernetes.aio.leaderelection.leaderelection import LeaderElection
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

from faasmoe_operator.errors import FaasmoeError

logger = logging.getLogger(__name__)

LEASE_NAME = "faasmoe-operator"
LEASE_S = 30
RENEW_DEADLINE_S = 20
RETRY_S = 5


class LeadershipLost(FaasmoeError):
    """Another operator may lead now."""


class _Lock(LeaseLock):
    """A lease; no answer is a failure like any other, not the end of the election."""

    async def get(self, name: str, namespace: str) -> Any:
        try:
            return await super().get(name, namespace)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            return False, ApiException(status=0, reason=str(error))

    async def create(self, name: str, namespace: str, election_record: Any) -> bool:
        try:
            return bool(await super().create(name, namespace, election_record))
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    async def update(self, name: str, namespace: str, updated_record: Any) -> bool:
        try:
            return bool(await super().update(name, namespace, updated_record))
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False


@asynccontextmanager
async def leading(client: ApiClient, *, namespace: str, identity: str) -> AsyncIterator[None]:
    """Wait until this operator leads; raises LeadershipLost within if it does no longer.

    Args:
        client: the API server.
        namespace: where the lease is.
        identity: name of this operator, unique among all.
    """
    won = asyncio.Event()

    async def lead() -> None:
        won.set()
        await asyncio.Event().wait()

    async def elect() -> None:
        lock = _Lock(LEASE_NAME, namespace, identity, client)
        config = Config(
            lock,
            lease_duration=LEASE_S,
            renew_deadline=RENEW_DEADLINE_S,
            retry_period=RETRY_S,
            onstarted_leading=lead,
            onstopped_leading=None,  # type: ignore[arg-type]  # it takes None and says otherwise
        )
        await LeaderElection(config).run()
        raise LeadershipLost(f"lease {namespace}/{LEASE_NAME} is lost")

    async with asyncio.TaskGroup() as group:
        election = group.create_task(elect())
        await won.wait()
        logger.info("%s leads", identity)
        try:
            yield
        finally:
            election.cancel()
