"""Reports the load of every function to the control plane, once a second.

The load meters count totals that only grow; the difference of two readings gives the averages of
the interval between them. While there is no load, reports are less frequent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from faasmoe_contracts.control_messages import FunctionLoad, LoadReport
from faasmoe_router.dispatch.load import LoadMeter, LoadTotals
from faasmoe_router.dispatch.routing import RoutingIndex
from faasmoe_router.errors import ControlError

logger = logging.getLogger(__name__)

LOAD_REPORT_INTERVAL_S = 1.0
IDLE_REPORT_INTERVAL_S = 5.0  # a control process may serve hundreds of idle routers
_ROUND_DIGITS = 6


class LoadReportSink(Protocol):
    """Receiver of load reports, such as `ControlClient`."""

    async def report_load(self, report: LoadReport) -> None:
        """Send a report; raises ControlError."""


class LoadReporter:
    """Reports how much each function is called.

    Args:
        client: receiver of the reports.
        router_name: name of this router.
        routing: returns the current routing.
        meters: load meters, each written by one thread.
        interval_s: time between two reports, in seconds.
        idle_interval_s: time between two reports without load, in seconds.
        is_busy: returns whether requests are being computed; while they are, a function that the
            current forward pass has not reached is not reported as idle.
        tenant_keys: returns the number of API keys of each tenant; None without tenants.
    """

    def __init__(
        self,
        client: LoadReportSink,
        *,
        router_name: str,
        routing: Callable[[], RoutingIndex],
        meters: Sequence[LoadMeter],
        interval_s: float = LOAD_REPORT_INTERVAL_S,
        idle_interval_s: float = IDLE_REPORT_INTERVAL_S,
        is_busy: Callable[[], bool] = lambda: False,
        tenant_keys: Callable[[], Mapping[str, int] | None] = lambda: None,
    ) -> None:
        self._client = client
        self._router_name = router_name
        self._routing = routing
        self._meters = meters
        self._interval_s = interval_s
        self._idle_interval_s = idle_interval_s
        self._is_busy = is_busy
        self._tenant_keys = tenant_keys
        self._is_failing = False

    async def run(self) -> None:
        """Report until cancelled; the content of a failed report is lost."""
        next_s = reported_s = time.monotonic()
        averager, pass_loads, reported_idle = LoadAverager(next_s), ForwardPassLoads(), False
        n_local, n_passes = self._n_local_calls(), self._n_passes()
        while True:
            next_s = max(next_s + self._interval_s, time.monotonic())
            await asyncio.sleep(next_s - time.monotonic())
            now_s, routing = time.monotonic(), self._routing()
            interval_s, loads = averager.average(
                now_s, merge_readings(m.snapshot(now_s) for m in self._meters)
            )
            passes_before, n_passes = n_passes, self._n_passes()
            loads = pass_loads.carry_over(
                loads, n_passes_started=n_passes - passes_before, is_busy=self._is_busy()
            )
            is_idle = all(load.is_idle for load in loads.values())
            if is_idle and reported_idle and now_s - reported_s < self._idle_interval_s:
                continue
            reported_s, reported_idle = now_s, is_idle
            local_before, n_local = n_local, self._n_local_calls()
            report = LoadReport(
                self._router_name,
                busy_functions(loads, known=routing.entries),
                queued=sum(meter.queued for meter in self._meters),
                n_local_calls=n_local - local_before,
                tenant_key_counts=self._tenant_keys(),
                interval_s=interval_s,
                sent_at_s=time.time(),
            )
            for meter in self._meters:
                meter.retain(routing.entries)
            await self._send(report)

    def _n_local_calls(self) -> int:
        """Return the number of calls that this router computed itself, since its start."""
        return sum(meter.local_calls for meter in self._meters)

    def _n_passes(self) -> int:
        """Return the number of forward passes started, since the router's start."""
        return sum(meter.forward_passes for meter in self._meters)

    async def _send(self, report: LoadReport) -> None:
        try:
            await self._client.report_load(report)
        except ControlError as error:
            if not self._is_failing:
                logger.warning("A load report failed: %s", error)
            self._is_failing = True
        else:
            self._is_failing = False


def merge_readings(readings: Iterable[Mapping[str, LoadTotals]]) -> dict[str, LoadTotals]:
    """Return the sum of the readings of several meters, by function id."""
    total: dict[str, LoadTotals] = {}
    for reading in readings:
        for name, (in_flight_s, calls, rows) in reading.items():
            subtotal = total.get(name, LoadTotals())
            total[name] = LoadTotals(
                subtotal.in_flight_s + in_flight_s, subtotal.calls + calls, subtotal.rows + rows
            )
    return total


def busy_functions(
    loads: Mapping[str, FunctionLoad], *, known: Collection[str]
) -> dict[str, FunctionLoad]:
    """Return the loads that a report contains: of known functions that are not idle."""
    return {name: load for name, load in loads.items() if name in known and not load.is_idle}


class LoadAverager:
    """Converts readings of growing totals to the load of each interval.

    Args:
        started_s: start of the first interval, monotonic seconds.
    """

    def __init__(self, started_s: float) -> None:
        self._last_s = started_s
        self._last_readings: Mapping[str, LoadTotals] = {}

    def average(
        self, now_s: float, readings: Mapping[str, LoadTotals]
    ) -> tuple[float, dict[str, FunctionLoad]]:
        """Return the interval since the last call, in seconds, and each function's load in it."""
        interval_s = max(now_s - self._last_s, 1e-9)
        loads = {}
        for name, (in_flight_s, calls, rows) in readings.items():
            last = self._last_readings.get(name, LoadTotals())
            concurrency = (in_flight_s - last.in_flight_s) / interval_s
            loads[name] = FunctionLoad(
                max(0.0, round(concurrency, _ROUND_DIGITS)), calls - last.calls, rows - last.rows
            )
        self._last_s, self._last_readings = now_s, readings
        return interval_s, loads


class ForwardPassLoads:
    """Carries loads over for functions that the current forward pass has not reached.

    A pass calls each function once, at its layer. On a busy machine, or as the first one after a
    start, a pass may take longer than the report interval, or even than the scale-to-zero window. A
    function that is not called within an interval is then not idle: its last load is repeated
    until a whole pass has not called it.
    """

    def __init__(self) -> None:
        self._last_pass: dict[str, FunctionLoad] = {}
        self._current_pass: dict[str, FunctionLoad] = {}
        self._n_passes_started = 0

    def carry_over(
        self, loads: Mapping[str, FunctionLoad], *, n_passes_started: int, is_busy: bool
    ) -> dict[str, FunctionLoad]:
        """Return the loads of an interval, with those carried over.

        Args:
            loads: measured load of each function.
            n_passes_started: forward passes started in the interval.
            is_busy: whether requests are being computed at its end.
        """
        called = {name: load for name, load in loads.items() if not load.is_idle}
        if not is_busy:
            self._last_pass, self._current_pass, self._n_passes_started = {}, called, 0
            return dict(loads)
        self._current_pass |= called
        self._n_passes_started += n_passes_started
        if self._n_passes_started >= 2:  # a whole pass lies between two starts
            self._last_pass, self._current_pass, self._n_passes_started = self._current_pass, {}, 0
        carried = self._last_pass | self._current_pass
        return {**loads, **{n: replace(x, calls=0, rows=0) for n, x in carried.items()}, **called}
