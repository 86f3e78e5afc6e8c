"""Sending a load report each second, and now and then while there is no load to tell of."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from faasmoe_router.control.errors import ControlError
from faasmoe_router.control.reports import LoadAverager, PassMemory, merge, report_body
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.dispatch.routing import Routing

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 1.0
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
        is_busy: tells whether requests are being computed. While they are, a function that the
            pass through the layers has not come to yet is not idle.
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
        averager, memory, told_idle = LoadAverager(next_s), PassMemory(), False
        n_local, n_passes = self._n_local(), self._n_passes()
        while True:
            next_s = max(next_s + self._interval_s, time.monotonic())
            await asyncio.sleep(next_s - time.monotonic())
            now_s, routing = time.monotonic(), self._routing()
            interval_s, loads = averager.take(now_s, merge(m.read(now_s) for m in self._meters))
            passes_before, n_passes = n_passes, self._n_passes()
            n_begun = n_passes - passes_before
            loads = memory.fill(loads, n_begun=n_begun, is_busy=self._is_busy())
            idle = all(load.is_idle for load in loads.values())
            if idle and told_idle and now_s - told_s < self._idle_interval_s:
                continue
            told_s, told_idle = now_s, idle
            local_before, n_local = n_local, self._n_local()
            body = report_body(
                loads,
                router=self._router,
                sent_at_s=time.time(),
                interval_s=interval_s,
                known=routing.entries,
                held=sum(meter.held for meter in self._meters),
                local=n_local - local_before,
                tenants=self._tenants(),
            )
            for meter in self._meters:
                meter.forget(routing.entries)
            await self._send(body)

    def _n_local(self) -> int:
        """Return the calls that were computed here so far."""
        return sum(meter.local for meter in self._meters)

    def _n_passes(self) -> int:
        """Return the passes through the layers that have begun so far."""
        return sum(meter.passes for meter in self._meters)

    async def _send(self, body: dict[str, object]) -> None:
        try:
            await self._client.report(body)
        except ControlError as error:
            if not self._failed:
                logger.warning("A load report failed: %s", error)
            self._failed = True
        else:
            self._failed = False
