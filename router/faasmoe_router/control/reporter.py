"""Sending a load report each second."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from faasmoe_router.control.errors import ControlError
from faasmoe_router.control.reports import LoadAverager, PassMemory, merge, report_body
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.dispatch.routing import Routing

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 1.0


class TakesReports(Protocol):
    """Where reports go; `ControlClient` is one."""

    async def report(self, body: dict[str, object]) -> None:
        """Send a report; raises ControlError."""


class LoadReporter:
    """Tells the control plane how much each function is called.

    Args:
        client: where reports go.
        router: this router's name.
        routing: tells where functions are now.
        meters: what is called, each written by one thread.
        interval_s: time between two reports.
        is_busy: tells whether requests are being computed. While they are, a function that the
            pass through the layers has not come to yet is not idle.
    """

    def __init__(
        self,
        client: TakesReports,
        *,
        router: str,
        routing: Callable[[], Routing],
        meters: Sequence[LoadMeter],
        interval_s: float = REPORT_INTERVAL_S,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self._client = client
        self._router = router
        self._routing = routing
        self._meters = meters
        self._interval_s = interval_s
        self._is_busy = is_busy
        self._failed = False

    async def run(self) -> None:
        """Report until cancelled; what a failed report would have told is lost."""
        next_s = time.monotonic()
        averager, memory = LoadAverager(next_s), PassMemory()
        n_local, n_passes = self._totals()
        while True:
            next_s = max(next_s + self._interval_s, time.monotonic())
            await asyncio.sleep(next_s - time.monotonic())
            now_s, routing = time.monotonic(), self._routing()
            interval_s, loads = averager.take(now_s, merge(m.read(now_s) for m in self._meters))
            local_before, passes_before = n_local, n_passes
            n_local, n_passes = self._totals()
            body = report_body(
                memory.fill(loads, n_begun=n_passes - passes_before, is_busy=self._is_busy()),
                router=self._router,
                sent_at_s=time.time(),
                interval_s=interval_s,
                known=routing.entries,
                held=sum(meter.held for meter in self._meters),
                local=n_local - local_before,
            )
            for meter in self._meters:
                meter.forget(routing.entries)
            await self._send(body)

    def _totals(self) -> tuple[int, int]:
        """Return the calls that were computed here, and the passes that have begun."""
        return sum(m.local for m in self._meters), sum(m.passes for m in self._meters)

    async def _send(self, body: dict[str, object]) -> None:
        try:
            await self._client.report(body)
        except ControlError as error:
            if not self._failed:
                logger.warning("A load report failed: %s", error)
            self._failed = True
        else:
            self._failed = False
