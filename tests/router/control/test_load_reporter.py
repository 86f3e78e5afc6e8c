"""Load reports while idle, while busy, and during forward passes longer than the interval."""

import asyncio
import time
from typing import Any, ClassVar, cast

from faasmoe_contracts.control_messages import LoadReport
from faasmoe_router.control.load_reporter import LoadReporter
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.dispatch.routing import RoutingIndex


class FakeReportSink:
    """Records the bodies of reports and sets `done` after enough of them."""

    def __init__(self, enough: int) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.done = asyncio.Event()
        self._enough = enough

    async def report_load(self, report: LoadReport) -> None:
        self.bodies.append(report.to_json())
        if len(self.bodies) >= self._enough:
            self.done.set()


class OneFunction:
    """A routing index of one function."""

    entries: ClassVar = {"f": None}


def reports_of(
    meter: LoadMeter, *, busy: bool, sink: FakeReportSink, idle_interval_s: float = 0.01
) -> FakeReportSink:
    """Report every 10 ms until there are enough reports."""

    async def run() -> FakeReportSink:
        reporter = LoadReporter(
            sink,
            router_name="r",
            routing=lambda: cast(RoutingIndex, OneFunction()),
            meters=(meter,),
            interval_s=0.01,
            idle_interval_s=idle_interval_s,
            is_busy=lambda: busy,
        )
        task = asyncio.create_task(reporter.run())
        await asyncio.wait_for(sink.done.wait(), 10)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return sink

    return asyncio.run(run())


def test_an_idle_router_reports_that_it_is_idle() -> None:
    reports = reports_of(LoadMeter(), busy=False, sink=FakeReportSink(3))
    assert all(body["functions"] == {} for body in reports.bodies)


def test_an_idle_router_reports_the_change_immediately_and_then_less_often() -> None:
    meter = LoadMeter()
    meter.record_start("f", time.monotonic(), rows=1)
    started_s = time.monotonic()

    class EndCallSink(FakeReportSink):
        async def report_load(self, report: LoadReport) -> None:
            if not self.bodies:
                meter.record_end("f", time.monotonic())
            await super().report_load(report)

    reports = reports_of(meter, busy=False, sink=EndCallSink(4), idle_interval_s=0.3)
    kinds = [bool(body["functions"]) for body in reports.bodies]
    assert kinds == sorted(kinds, reverse=True)
    assert time.monotonic() - started_s >= 0.3
    assert kinds[-2:] == [False, False]


def test_a_function_that_a_long_pass_has_not_reached_is_not_reported_as_idle() -> None:
    meter, now_s = LoadMeter(), time.monotonic()
    meter.forward_passes += 1
    meter.record_start("f", now_s, rows=3)
    meter.record_end("f", now_s + 0.001)
    reports = reports_of(meter, busy=True, sink=FakeReportSink(20))
    loads = [body["functions"]["f"] for body in reports.bodies]
    assert all(load["concurrency"] > 0 for load in loads)
    assert [load["calls"] for load in loads] == [1] + [0] * (len(loads) - 1)


def test_a_busy_router_reports_its_calls() -> None:
    meter = LoadMeter()
    meter.record_start("f", time.monotonic(), rows=3)
    reports = reports_of(meter, busy=True, sink=FakeReportSink(2))
    assert all(body["functions"]["f"]["concurrency"] > 0 for body in reports.bodies)
