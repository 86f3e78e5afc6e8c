"""Load reports: two readings of the meters make the averages of the time between. Pure.

Sending a load report each second, and now and then while there is no load to tell of.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from faasmoe_router.dispatch.load import LoadMeter, LoadTotals
from faasmoe_router.dispatch.routing import RoutingIndex
from faasmoe_router.errors import ControlError

logger = logging.getLogger(__name__)


_ROUND_DIGITS = 6


@dataclass(frozen=True, slots=True)
class FunctionLoad:
    """One function's load over an interval.

    Attributes:
        concurrency: time average of the calls in flight, those that are held included.
        calls: calls begun.
        rows: rows that they carried.
    """

    concurrency: float
    calls: int
    rows: int

    @property
    def is_idle(self) -> bool:
        """Whether there was none."""
        return not (self.concurrency or self.calls)

    def to_json(self) -> dict[str, float | int]:
        """Return the JSON object of this load."""
        return {"concurrency": self.concurrency, "calls": self.calls, "rows": self.rows}


def merge_readings(readings: Iterable[Mapping[str, LoadTotals]]) -> dict[str, LoadTotals]:
    """Add up the readings of several meters."""
    total: dict[str, LoadTotals] = {}
    for reading in readings:
        for name, (in_flight_s, calls, rows) in reading.items():
            subtotal = total.get(name, LoadTotals())
            total[name] = LoadTotals(
                subtotal.in_flight_s + in_flight_s, subtotal.calls + calls, subtotal.rows + rows
            )
    return total


class LoadAverager:
    """Turns totals that grow for ever into loads by interval."""

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
    """Knows the load of functions that a pass through the model's layers has not come to yet.

    Each function is called once in a pass, at its layer's turn. A pass may take longer than the
    interval of the reports, or even than the window after which an idle function goes: the first
    one after a start, on a busy machine. A function that is not called in such an interval is not
    idle; its last load stands until a whole pass has left it out.
    """

    def __init__(self) -> None:
        self._last_pass: dict[str, FunctionLoad] = {}
        self._current_pass: dict[str, FunctionLoad] = {}
        self._n_passes_started = 0

    def carry_over(
        self, loads: Mapping[str, FunctionLoad], *, n_passes_started: int, is_busy: bool
    ) -> dict[str, FunctionLoad]:
        """Return the loads of an interval, with those that stand.

        Args:
            loads: of each function.
            n_begun: passes that began in the interval.
            is_busy: whether requests are computed at its end.
        """
        called = {name: load for name, load in loads.items() if not load.is_idle}
        if not is_busy:
            self._last_pass, self._current_pass, self._n_passes_started = {}, called, 0
            return dict(loads)
        self._current_pass |= called
        self._n_passes_started += n_passes_started
        if self._n_passes_started >= 2:  # between two beginnings lies a whole pass
            self._last_pass, self._current_pass, self._n_passes_started = self._current_pass, {}, 0
        carried = self._last_pass | self._current_pass
        return {**loads, **{n: replace(x, calls=0, rows=0) for n, x in carried.items()}, **called}


def load_report_body(
    loads: Mapping[str, FunctionLoad],
    *,
    router_name: str,
    sent_at_s: float,
    interval_s: float,
    known: Collection[str],
    n_queued: int,
    n_local: int,
    tenant_keys: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return the body of a load report: of the functions that are known, those that have load.

    How many keys each tenant has is told where there are tenants.
    """
    busy = {name: load for name, load in loads.items() if name in known and not load.is_idle}
    return {
        "router": router_name,
        "sent_at_s": sent_at_s,
        "interval_s": interval_s,
        "functions": {name: load.to_json() for name, load in busy.items()},
        "held": n_queued,
        "local": n_local,
        **({} if tenant_keys is None else {"tenants": dict(tenant_keys)}),
    }


LOAD_REPORT_INTERVAL_S = 1.0
IDLE_REPORT_INTERVAL_S = 5.0  # one control may have hundreds of routers that have nothing to tell


class LoadReportSink(Protocol):
    """Where reports go; `ControlClient` is one."""

    async def report_load(self, body: dict[str, object]) -> None:
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
        """Report until cancelled; what a failed report would have told is lost."""
        next_s = reported_s = time.monotonic()
        averager, pass_loads, reported_idle = LoadAverager(next_s), ForwardPassLoads(), False
        n_local, n_passes = self._n_local(), self._n_passes()
        while True:
            next_s = max(next_s + self._interval_s, time.monotonic())
            await asyncio.sleep(next_s - time.monotonic())
            now_s, routing = time.monotonic(), self._routing()
            interval_s, loads = averager.average(
                now_s, merge_readings(m.snapshot(now_s) for m in self._meters)
            )
            passes_before, n_passes = n_passes, self._n_passes()
            n_passes_started = n_passes - passes_before
            loads = pass_loads.carry_over(
                loads, n_passes_started=n_passes_started, is_busy=self._is_busy()
            )
            is_idle = all(load.is_idle for load in loads.values())
            if is_idle and reported_idle and now_s - reported_s < self._idle_interval_s:
                continue
            reported_s, reported_idle = now_s, is_idle
            local_before, n_local = n_local, self._n_local()
            body = load_report_body(
                loads,
                router_name=self._router_name,
                sent_at_s=time.time(),
                interval_s=interval_s,
                known=routing.entries,
                n_queued=sum(meter.queued for meter in self._meters),
                n_local=n_local - local_before,
                tenant_keys=self._tenant_keys(),
            )
            for meter in self._meters:
                meter.retain(routing.entries)
            await self._send(body)

    def _n_local(self) -> int:
        """Return the calls that were computed here so far."""
        return sum(meter.local_calls for meter in self._meters)

    def _n_passes(self) -> int:
        """Return the passes through the layers that have begun so far."""
        return sum(meter.forward_passes for meter in self._meters)

    async def _send(self, body: dict[str, object]) -> None:
        try:
            await self._client.report_load(body)
        except ControlError as error:
            if not self._is_failing:
                logger.warning("A load report failed: %s", error)
            self._is_failing = True
        else:
            self._is_failing = False
