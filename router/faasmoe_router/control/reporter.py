"""Sending a load report each second, and now and then while there is no load to tell of."""

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
IDLE_INTERVAL_S = 5.0  # one control may have hundreds of routers that have nothing to tell


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
        idle_interval_s: time between two reports that say both that there is no load.
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
        idle_interval_s: float = IDLE_INTERVAL_S,
        is_busy: Callable[[], bool] = lambda: False,
        tenants: Callable[[], Mapping[str, int] | None] = lambda: None,
    ) -> None:
        self._client = client
        self._router = router
        self._routing = routing
        self._meters = meters
        self._interval_s = interval_s
        self._idle_interval_s = idle_interval_s
        self._is_busy = is_busy
        self._tenants = tenants
        self._failed = False

    async def run(self) -> None:
        """Report until cancelled; what a failed report would have told is lost."""
        next_s = told_s = time.monotonic()
        averager, told_idle = LoadAverager(next_s), False
        n_local = sum(meter.local for meter in self._meters)
        while True:
            next_s = max(next_s + self._interval_s, time.monotonic())
            await asyncio.sleep(next_s - time.monotonic())
            now_s, routing = time.monotonic(), self._routing()
            interval_s, loads = averager.take(now_s, merge(m.read(now_s) for m in self._meters))
            idle = all(load.is_idle for load in loads.values())
            if idle and now_s - told_s < self._may_be_silent_s(told_idle):
                continue
            told_s, told_idle = now_s, idle
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

    def _may_be_silent_s(self, told_idle: bool) -> float:
        """Return how long there need not be a report while there is no load."""
        if self._is_busy():
            return MAX_SILENCE_S
        return self._idle_interval_s if told_idle else 0.0

    async def _send(self, body: dict[str, object]) -> None:
        try:
            await self._client.report(body)
        except ControlError as error:
            if not self._failed:
                logger.warning("A load report failed: %s", error)
            self._failed = True
        else:
            self._failed = False
