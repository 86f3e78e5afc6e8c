"""The control plane's end of the connections by which gateways report requests of each model.

The messages are `faasmoe_contracts.router_demand`'s.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from faasmoe_contracts.json_reader import ContractError
from faasmoe_contracts.router_demand import MAX_LINE_BYTES, RouterDemand, RunningRouters
from faasmoe_operator.aio import ChangeNotifier, LineSource

logger = logging.getLogger(__name__)

SILENCE_S = 30.0  # gateways report every `REPORT_INTERVAL_S`


@dataclass(slots=True, eq=False)
class _Link:
    """A connection to one gateway."""

    writer: asyncio.StreamWriter
    demand: RouterDemand = field(default_factory=RouterDemand)


class GatewayLinks:
    """All gateways of a machine, or of a cluster."""

    def __init__(self) -> None:
        self._links: list[_Link] = []
        self._running: dict[str, tuple[str, ...]] = {}
        self._version = 0
        self._on_demand: dict[str, Callable[[], None]] = {}
        self._changed = ChangeNotifier()

    def add(self, model: str, on_demand: Callable[[], None]) -> None:
        """Add a model, and what is called when its requests may have changed."""
        self._running[model] = ()
        self._on_demand[model] = on_demand

    def remove(self, model: str) -> None:
        """Remove a model, if it is there."""
        self._running.pop(model, None)
        self._on_demand.pop(model, None)

    def n_requests(self, model: str) -> int:
        """Return the requests of a model that are waiting or running."""
        return sum(link.demand.models.get(model, 0) for link in self._links)

    def announce(self, model: str, running: tuple[str, ...]) -> bool:
        """Tell all gateways which routers of a model take requests; return whether that is new."""
        if running == self._running[model]:
            return False
        self._running[model] = running
        self._version += 1
        for link in self._links:
            link.writer.write(self._line())
        return True

    async def wait_until_unused(
        self, model: str, router: str, *, unless: Callable[[], bool]
    ) -> None:
        """Wait until every gateway knows the last announcement and uses a router no more.

        Args:
            model: the model.
            router: the router's name.
            unless: returns whether waiting is no longer needed.
        """
        version = self._version

        def is_unused() -> bool:
            return unless() or all(
                link.demand.seen >= version
                and not link.demand.routers.get(model, {}).get(router, 0)
                for link in self._links
            )

        await self._changed.wait_for(is_unused)

    @asynccontextmanager
    async def listening(self, path: Path) -> AsyncIterator[None]:
        """Listen for gateways for the lifetime of the context.

        Args:
            path: Unix socket to listen on.
        """
        server = await asyncio.start_unix_server(self.serve, str(path), limit=MAX_LINE_BYTES)
        try:
            yield
        finally:
            server.close()
            for link in self._links:
                link.writer.close()

    async def serve(self, reader: LineSource, writer: asyncio.StreamWriter) -> None:
        """Follow one gateway until it disconnects, or is silent as its machine is gone."""
        link = _Link(writer)
        self._links.append(link)
        writer.write(self._line())
        try:
            while line := await _next_line(reader):
                link.demand = RouterDemand.loads(line)
                self._notify()
        except (ContractError, ValueError, OSError) as error:
            logger.error("A gateway's demand cannot be read: %s", error)
        finally:
            self._links.remove(link)  # its requests have ended with it
            self._notify()
            writer.close()

    def _line(self) -> bytes:
        return RunningRouters(self._version, self._running).dumps()

    def _notify(self) -> None:
        for on_demand in self._on_demand.values():
            on_demand()
        self._changed.notify()


async def _next_line(reader: LineSource) -> bytes:
    try:
        async with asyncio.timeout(SILENCE_S):
            return await reader.readline()
    except TimeoutError:
        raise ConnectionError(f"it was silent for {SILENCE_S:g} s") from None
