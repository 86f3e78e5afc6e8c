"""Reports the requests of each model to whoever starts and stops routers, and learns who runs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Never

from faasmoe_contracts.json_reader import ContractError
from faasmoe_contracts.router_demand import (
    MAX_LINE_BYTES,
    REPORT_INTERVAL_S,
    RouterDemand,
    RunningRouters,
)
from faasmoe_contracts.socket_address import write
from faasmoe_gateway.control_link import ControlLink

logger = logging.getLogger(__name__)

RECONNECT_S = 0.1
UNUSED_AFTER_S = 0.02  # without a request; clients that send one after the other change nothing


class DemandReporter:
    """Counts requests and reports them.

    Args:
        link: where to report; None reports nothing, as routers are always there.

    Attributes:
        on_routers: called with the routers that take requests, by model, whenever that changes.
    """

    def __init__(self, link: ControlLink | None) -> None:
        self.on_routers: Callable[[Mapping[str, tuple[str, ...]]], None] = lambda _: None
        self._link = link
        self._demand = RouterDemand()
        self._running: Mapping[str, tuple[str, ...]] = {}
        self._is_new = asyncio.Event()

    @contextmanager
    def request(self, model: str) -> Iterator[None]:
        """Count a request of a model within the context.

        The first one is reported at once, and the end of the last one as soon as no other follows:
        others may wait for the memory of the model.
        """
        models = self._demand.models
        models[model] = models.get(model, 0) + 1
        if models[model] == 1:
            self._is_new.set()
        try:
            yield
        finally:
            models[model] -= 1
            if not models[model] and self._link is not None:
                loop = asyncio.get_running_loop()
                loop.call_later(UNUSED_AFTER_S, self._tell_if_unused, model)

    @contextmanager
    def sent(self, model: str, router: str) -> Iterator[None]:
        """Count a request that is sent to a router within the context.

        The end of the last one is reported at once if the router takes no more.
        """
        routers = self._demand.routers.setdefault(model, {})
        routers[router] = routers.get(router, 0) + 1
        try:
            yield
        finally:
            routers[router] -= 1
            if not routers[router] and router not in self._running.get(model, ()):
                self._is_new.set()

    def _tell_if_unused(self, model: str) -> None:
        if not self._demand.models[model]:
            self._is_new.set()

    async def run(self) -> None:
        """Report until cancelled, and connect again if the other side ends."""
        if self._link is None:
            return
        while True:
            try:
                await self._run_connection(self._link)
            except (OSError, ContractError, ValueError) as error:
                logger.warning("No demand can be reported to %s: %s", self._link, error)
                await asyncio.sleep(RECONNECT_S)

    async def _run_connection(self, link: ControlLink) -> None:
        reader, writer = await link.open(limit=MAX_LINE_BYTES)
        link.is_connected = True
        tasks = [
            asyncio.create_task(self._report(writer)),
            asyncio.create_task(self._follow(reader)),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._demand.seen = 0
            link.is_connected = False
            writer.close()

    async def _report(self, writer: asyncio.StreamWriter) -> Never:
        while True:
            self._is_new.clear()
            write(writer, self._demand.dumps())
            await writer.drain()
            try:
                async with asyncio.timeout(REPORT_INTERVAL_S):
                    await self._is_new.wait()
            except TimeoutError:
                continue

    async def _follow(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            running = RunningRouters.loads(line)
            self._running = running.routers
            self.on_routers(running.routers)
            self._demand.seen = running.version
            self._is_new.set()
