"""Sending wakes: at once, one for all who wait."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable

from faasmoe_router.control.client import ControlClient
from faasmoe_router.control.errors import ControlError
from faasmoe_router.control.metrics import ControlMetrics
from faasmoe_router.control.wakes import REPEAT_S, WakeRegister

logger = logging.getLogger(__name__)


class Waker:
    """Asks the control plane for functions. Belongs to the event loop, but for `want_soon`."""

    def __init__(
        self,
        client: ControlClient,
        *,
        router: str,
        metrics: ControlMetrics,
        repeat_s: float = REPEAT_S,
    ) -> None:
        self._client = client
        self._router = router
        self._metrics = metrics
        self._register = WakeRegister(repeat_s)
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failed = False

    def want(self, function_ids: Iterable[str]) -> None:
        """Ask for functions, unless that was done lately."""
        self._register.want(function_ids)
        self._changed.set()

    def want_soon(self, function_ids: Iterable[str]) -> None:
        """Ask for functions, from any thread; ignored while nothing runs."""
        loop, wanted = self._loop, list(function_ids)
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(self.want, wanted)

    def keep(self, missing: Collection[str]) -> None:
        """Ask only for these from now on: the others have addresses."""
        self._register.keep(missing)

    def forget_asked(self) -> None:
        """Forget who was asked: another control process has begun."""
        self._register.forget_asked()

    async def run(self, missing: Callable[[], Collection[str]]) -> None:
        """Send wakes until cancelled.

        Args:
            missing: tells which functions have no address; others are not asked for.
        """
        self._loop = asyncio.get_running_loop()
        try:
            while True:
                await self._wait_until_due()
                self._register.keep(set(missing()))
                if due := self._register.take_due(time.monotonic()):
                    await self._send(due)
        finally:
            self._loop = None

    async def _wait_until_due(self) -> None:
        self._changed.clear()
        left_s = self._register.next_s() - time.monotonic()
        if left_s <= 0:
            return
        try:
            async with asyncio.timeout(None if math.isinf(left_s) else left_s):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _send(self, function_ids: list[str]) -> None:
        body = {"router": self._router, "sent_at_s": time.time(), "functions": function_ids}
        self._metrics.wakes.inc()
        try:
            await self._client.wake(body)
        except ControlError as error:
            if not self._failed:
                logger.warning("A wake of %d functions failed: %s", len(function_ids), error)
            self._failed = True
        else:
            self._failed = False
