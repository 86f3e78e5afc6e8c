"""Leases tokens of the tenants' limits, so that several gateways admit what one would.

Buckets that were used lately are renewed every `RENEW_S`, and at once when one lacks tokens for a
request. Without the authority each goes on with the share that it was given last.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Never

from faasmoe_contracts.json_reader import ContractError
from faasmoe_contracts.lease_messages import (
    MAX_LINE_BYTES,
    RENEW_S,
    LeaseAnswer,
    LeaseReport,
    PeriodUsage,
)
from faasmoe_contracts.socket_address import write
from faasmoe_gateway.accounts import Accounts
from faasmoe_gateway.control_link import ControlLink

logger = logging.getLogger(__name__)

RECONNECT_S = 0.1
ANSWER_TIMEOUT_S = 1.0
MAX_WAIT_S = 0.5  # of a request for a renewal


class LeaseClient:
    """Renews the leases of all accounts.

    Args:
        link: where the authority is.
        holder: name of this gateway.
        run: name of what counts the accounts' usage.
        accounts: the tenants' limits and usage.
        clock: returns monotonic seconds.
        wall_clock: returns seconds since the epoch.

    Attributes:
        renewed_s: when leases were renewed last; -inf for never.
    """

    def __init__(
        self,
        link: ControlLink,
        holder: str,
        accounts: Accounts,
        *,
        run: str,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self.renewed_s = float("-inf")
        self._link = link
        self._holder = holder
        self._run = run
        self._accounts = accounts
        self._clock = clock
        self._wall_clock = wall_clock
        self._is_wanted = asyncio.Event()
        self._renewal: asyncio.Future[None] | None = None

    async def renew(self) -> bool:
        """Renew at once; return whether that succeeded."""
        if not self._link.is_connected:
            return False
        if self._renewal is None:
            self._renewal = asyncio.get_running_loop().create_future()
        self._is_wanted.set()
        try:
            async with asyncio.timeout(MAX_WAIT_S):
                await asyncio.shield(self._renewal)
        except (TimeoutError, ConnectionError):
            return False
        return True

    async def run(self) -> Never:
        """Renew until cancelled, and connect again if the authority ends."""
        while True:
            try:
                await self._run_connection()
            except (OSError, TimeoutError, ContractError, ValueError) as error:
                logger.warning("No leases from %s: %r", self._link, error)
            self._link.is_connected = False
            self._end_renewal(ConnectionError("the authority is away"))
            await asyncio.sleep(RECONNECT_S)

    async def _run_connection(self) -> None:
        reader, writer = await self._link.open(limit=MAX_LINE_BYTES)
        told: dict[str, PeriodUsage] = {}
        self._link.is_connected = True
        try:
            while True:
                self._is_wanted.clear()
                renewal, self._renewal = self._renewal, None
                try:
                    await self._renew_once(reader, writer, told)
                finally:
                    _settle(renewal, None)
                try:
                    async with asyncio.timeout(RENEW_S):
                        await self._is_wanted.wait()
                except TimeoutError:
                    continue
        finally:
            writer.close()

    async def _renew_once(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        told: dict[str, PeriodUsage],
    ) -> None:
        usage = self._accounts.period_usage(self._wall_clock())
        changed = {name: used for name, used in usage.items() if told.get(name) != used}
        requests = self._accounts.lease_requests(self._clock())
        write(writer, LeaseReport(self._holder, requests, changed, self._run).dumps())
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            line = await reader.readline()
        if not line:
            raise ConnectionError("the authority has ended")
        self._accounts.apply_leases(LeaseAnswer.loads(line), self._clock())
        self.renewed_s = self._clock()
        told |= changed

    def _end_renewal(self, error: Exception) -> None:
        renewal, self._renewal = self._renewal, None
        _settle(renewal, error)


def _settle(renewal: asyncio.Future[None] | None, error: Exception | None) -> None:
    if renewal is None or renewal.done():
        return
    if error is None:
        renewal.set_result(None)
    else:
        renewal.set_exception(error)
        renewal.exception()  # nobody may be waiting any more
