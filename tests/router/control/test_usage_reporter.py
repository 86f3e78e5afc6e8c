"""Usage reports: repeated totals, usage of other routers, failures and unchanged totals."""

from __future__ import annotations

import asyncio
import logging
import time

import pytest

from faasmoe_contracts.usage import ClusterTotals, UsageRecord, UsageReport
from faasmoe_router.control.usage_reporter import UsageReporter
from faasmoe_router.errors import ControlError, ControlProtocolError, ControlUnreachable
from faasmoe_router.tenants.usage import RouterUsage
from faasmoe_router.tenants.usage_store import ClusterUsage


class FakeUsageSink:
    """Records reports; responds with totals or raises an error."""

    def __init__(self, response: ClusterTotals | ControlError) -> None:
        self.response = response
        self.reports: list[UsageReport] = []

    async def report_usage(self, report: UsageReport) -> ClusterTotals:
        self.reports.append(report)
        if isinstance(self.response, ControlError):
            raise self.response
        return self.response


def usage_of(n_tokens: int) -> RouterUsage:
    usage = RouterUsage(200.0)
    usage.for_tenant("acme").prompt_tokens = n_tokens
    return usage


def totals(n_tokens: int) -> ClusterTotals:
    return ClusterTotals(100.0, {"acme": UsageRecord(prompt_tokens=n_tokens, completed=4)})


def send_reports(
    sink: FakeUsageSink, source: ClusterUsage, *, n_routers: int = 2, times: int = 1
) -> None:
    async def run() -> None:
        reporter = UsageReporter(sink, source, n_routers=lambda: n_routers)
        for _ in range(times):
            await reporter.report()

    asyncio.run(run())


def test_remote_usage_is_the_total_minus_what_was_reported() -> None:
    usage = usage_of(7)
    cluster_usage = ClusterUsage(usage)
    assert cluster_usage.cluster_total("acme").prompt_tokens == 7
    assert cluster_usage.remote.as_of_s is None
    sink = FakeUsageSink(totals(10))
    send_reports(sink, cluster_usage)
    assert sink.reports[0].source_id == usage.source_id
    assert sink.reports[0].tenants["acme"].prompt_tokens == 7
    total = cluster_usage.cluster_total("acme")
    assert (total.prompt_tokens, total.completed) == (10, 4)
    usage.for_tenant("acme").prompt_tokens = 9  # counts before it is reported
    assert cluster_usage.cluster_total("acme").prompt_tokens == 12
    assert cluster_usage.remote.since_s == 100.0
    assert time.time() - (cluster_usage.remote.as_of_s or 0.0) < 60


def test_a_tenant_without_local_usage_has_its_remote_usage() -> None:
    cluster_usage = ClusterUsage(RouterUsage(200.0))
    send_reports(FakeUsageSink(totals(10)), cluster_usage)
    assert cluster_usage.cluster_total("acme").prompt_tokens == 10
    assert cluster_usage.cluster_total("beta") == UsageRecord()


@pytest.mark.parametrize("error", [ControlUnreachable("away"), ControlProtocolError("usage: …")])
def test_remote_usage_is_kept_while_reports_fail(
    error: ControlError, caplog: pytest.LogCaptureFixture
) -> None:
    usage = usage_of(7)
    cluster_usage = ClusterUsage(usage)
    sink = FakeUsageSink(totals(10))
    send_reports(sink, cluster_usage)
    sink.response = error
    usage.for_tenant("acme").prompt_tokens = 8
    with caplog.at_level(logging.WARNING):
        send_reports(sink, cluster_usage, times=3)
    assert cluster_usage.cluster_total("acme").prompt_tokens == 11
    assert caplog.text.count("usage report failed") == 1


def test_a_lone_router_does_not_report_unchanged_totals() -> None:
    usage = usage_of(7)
    cluster_usage = ClusterUsage(usage)
    sink = FakeUsageSink(totals(7))

    async def run() -> None:
        reporter = UsageReporter(sink, cluster_usage, n_routers=lambda: 1)
        await reporter.report()
        await reporter.report()
        assert len(sink.reports) == 1
        usage.for_tenant("acme").prompt_tokens = 8
        await reporter.report()
        await reporter.report_final()
        assert [report.is_final for report in sink.reports] == [False, False, True]

    asyncio.run(run())


def test_one_of_several_routers_reports_unchanged_totals_to_get_those_of_the_others() -> None:
    sink = FakeUsageSink(totals(7))
    send_reports(sink, ClusterUsage(usage_of(7)), times=3)
    assert len(sink.reports) == 3
