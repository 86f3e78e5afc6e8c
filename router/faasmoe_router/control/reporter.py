"""Sending a load report each second."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from faasmoe_router.control.errors import ControlError
from faasmoe_router.control.reports import LoadAverager, merge, report_body
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.dispatch.routing import Routing

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 1.0
MAX_SILENCE_S = 8.0  # control takes a router that is silent for 10 s for idle


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
        is_busy: tells whether requests are being computed. While they are, an interval without any
            call says nothing about load (a long step between two layers), so it is not reported,
            for a time: control goes on with the last report.
        tenants: tells how many keys each tenant has; None without tenants.
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
        tenants: Callable[[], Mapping[str, int] | None] = lambda: None,
    ) -> None:
        self._client = client
        self._router = router
        self._routing = routing
        self._meters = meters
        self._interval_s = interval_s
        self._is_busy = is_busy
        self._tenants = tenants
        self._failed = False

    async def run(self) -> None:
        """Report until cancelled; what a failed report would have told is lost."""
        next_s = told_s = time.monotonic()
        averager = LoadAverager(next_s)
        n_local = sum(meter.local for meter in self._meters)
        while True:
            next_s = max(next_s + self._interval_s, time.monotonic())
            await asyncio.sleep(next_s - time.monotonic())
            now_s, routing = time.monotonic(), self._routing()
            interval_s, loads = averager.take(now_s, merge(m.read(now_s) for m in self._meters))
            idle = all(load.is_idle for load in loads.values())
            if idle and self._is_busy() and now_s - told_s < MAX_SILENCE_S:
                continue
            told_s = now_s
            before, n_local = n_local, sum(meter.local for meter in self._meters)
            body = report_body(
                loads,
                router=self._router,
                sent_at_s=time.time(),
                interval_s=interval_s,
                known=routing.entries,
                held=sum(meter.held for meter in self._meters),
                local=n_local - before,
                tenants=self._tenants(),
            )
            for meter in self._meters:
                meter.forget(routing.entries)
            await self._send(body)

    async def _send(self, body: dict[str, object]) -> None:
        try:
            await self._client.report(body)
        except ControlError as error:
            if not self._failed:
                logger.warning("A load report failed: %s", error)
            self._failed = True
        else:
            self._failed = False
