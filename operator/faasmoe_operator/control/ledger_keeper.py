"""Writing the ledger down: some seconds after it has changed, and at once when a router ends.

A router that goes on tells its totals again, whatever was lost here; one that ends does not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from faasmoe_operator.control.ledger import Ledger
from faasmoe_operator.platforms.roster import Change

logger = logging.getLogger(__name__)

RETRY_S = 5.0
LAST_WRITE_TIMEOUT_S = 2.0


class LedgerKeeper:
    """Writes one ledger until cancelled, and then a last time.

    Args:
        ledger: the ledger.
        changed: tells when it may have changed.
        write: writes it whole; returns whether that went well.
        interval_s: time from a change to its being written.
    """

    def __init__(
        self,
        ledger: Ledger,
        changed: Change,
        write: Callable[[Ledger], Awaitable[bool]],
        *,
        interval_s: float,
    ) -> None:
        self._ledger = ledger
        self._changed = changed
        self._write = write
        self._interval_s = interval_s
        self._n_tellings = ledger.n_tellings
        self._n_endings = ledger.n_endings

    async def run(self) -> None:
        """Write what is new."""
        try:
            while True:
                await self._changed.wait_for(self._is_new)
                await self._wait_for_an_ending()
                if not await self._write_new():
                    await asyncio.sleep(RETRY_S)
        finally:
            await self._write_last()

    async def _wait_for_an_ending(self) -> None:
        try:
            async with asyncio.timeout(self._interval_s):
                await self._changed.wait_for(lambda: self._ledger.n_endings != self._n_endings)
        except TimeoutError:
            return

    async def _write_last(self) -> None:
        if not self._is_new():
            return
        try:
            async with asyncio.timeout(LAST_WRITE_TIMEOUT_S):
                await self._write_new()
        except TimeoutError:
            logger.warning("the tenants' accounts were not written in time")

    async def _write_new(self) -> bool:
        told = self._ledger.n_tellings, self._ledger.n_endings
        is_written = await self._write(self._ledger)
        if is_written:
            self._n_tellings, self._n_endings = told
        return is_written

    def _is_new(self) -> bool:
        return self._ledger.n_tellings != self._n_tellings
