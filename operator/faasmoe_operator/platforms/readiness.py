"""Asks sandboxes whether they are ready, again and again while they start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import aiohttp


class ReadinessProber:
    """Probes under way, one for each sandbox that is starting.

    Args:
        interval_s: between two probes of a sandbox.
        timeout_s: for the answer to one.
        ready: called with the sandbox's id when it says that it is ready.
    """

    def __init__(
        self, *, interval_s: float, timeout_s: float, on_ready: Callable[[str], None]
    ) -> None:
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._on_ready = on_ready
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def open(self) -> None:
        """Open the connections' pool."""
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        self._http = aiohttp.ClientSession(timeout=timeout)

    async def close(self) -> None:
        """End all probes."""
        tasks = list(self._tasks.values())
        for name in list(self._tasks):
            self.stop(name)
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.close()

    def start(self, name: str, address: str) -> None:
        """Probe a sandbox until it is ready, unless that is under way."""
        if name not in self._tasks:
            self._tasks[name] = asyncio.create_task(self._probe(name, address))

    def stop(self, name: str) -> None:
        """Probe a sandbox no more."""
        if task := self._tasks.pop(name, None):
            task.cancel()

    async def _probe(self, name: str, address: str) -> None:
        while True:
            if await self._is_ready(address):
                break
            await asyncio.sleep(self._interval_s)
        del self._tasks[name]
        self._on_ready(name)

    async def _is_ready(self, address: str) -> bool:
        try:
            async with self._http.get(f"http://{address}/readyz") as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False
