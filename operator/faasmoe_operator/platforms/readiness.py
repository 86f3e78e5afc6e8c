"""Readiness probes: polls `/readyz` of starting sandboxes until they are ready."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiohttp

from faasmoe_contracts.tls import TlsPeer
from faasmoe_operator.aio import http_scheme


class ReadinessProber:
    """Runs one probe task for each starting sandbox.

    Args:
        interval_s: seconds between two probes of a sandbox.
        timeout_s: timeout of one probe.
        on_ready: called once with a sandbox's id when it responds with status 200.
        tls: how sandboxes are known; None probes them without TLS.
    """

    def __init__(
        self,
        *,
        interval_s: float,
        timeout_s: float,
        on_ready: Callable[[str], None],
        tls: TlsPeer | None = None,
    ) -> None:
        self._tls = tls
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._on_ready = on_ready
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def open(self) -> None:
        """Open the HTTP connection pool; requires a running event loop."""
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        self._http = aiohttp.ClientSession(timeout=timeout)

    async def close(self) -> None:
        """Cancel all probes and close the connection pool."""
        tasks = list(self._tasks.values())
        self.stop_all()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.close()

    def start(self, name: str, address: str) -> None:
        """Probe a sandbox until it is ready; does nothing if a probe is already running."""
        if name not in self._tasks:
            self._tasks[name] = asyncio.create_task(self._probe(name, address))

    def stop(self, name: str) -> None:
        """Stop probing a sandbox; does nothing if no probe is running."""
        if task := self._tasks.pop(name, None):
            task.cancel()

    def stop_all(self) -> None:
        """Stop all probes."""
        for name in list(self._tasks):
            self.stop(name)

    async def _probe(self, name: str, address: str) -> None:
        while True:
            if await self._is_ready(address):
                break
            await asyncio.sleep(self._interval_s)
        del self._tasks[name]
        self._on_ready(name)

    async def _is_ready(self, address: str) -> bool:
        try:
            scheme, secured = http_scheme(self._tls)
            async with self._http.get(f"{scheme}://{address}/readyz", **secured) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False
