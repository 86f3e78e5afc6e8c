"""Reports the requests of each model to whoever starts and stops routers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from faasmoe_contracts.router_demand import REPORT_INTERVAL_S, RouterDemand

logger = logging.getLogger(__name__)

RECONNECT_S = 0.1


class DemandReporter:
    """Counts requests and reports them.

    Args:
        path: socket to report to; None reports nothing, as routers are always there.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._demand = RouterDemand()
        self._is_new = asyncio.Event()

    @contextmanager
    def request(self, model: str) -> Iterator[None]:
        """Count a request of a model within the context; the first one is reported at once."""
        self._demand[model] = self._demand.get(model, 0) + 1
        if self._demand[model] == 1:
            self._is_new.set()
        try:
            yield
        finally:
            self._demand[model] -= 1

    async def run(self) -> None:
        """Report until cancelled, and connect again if the other side ends."""
        if self._path is None:
            return
        while True:
            try:
                _, writer = await asyncio.open_unix_connection(str(self._path))
                try:
                    await self._report(writer)
                finally:
                    writer.close()
            except OSError as error:
                logger.warning("No demand can be reported to %s: %s", self._path, error)
                await asyncio.sleep(RECONNECT_S)

    async def _report(self, writer: asyncio.StreamWriter) -> None:
        while True:
            self._is_new.clear()
            writer.write(self._demand.dumps())
            await writer.drain()
            try:
                async with asyncio.timeout(REPORT_INTERVAL_S):
                    await self._is_new.wait()
            except TimeoutError:
                continue
