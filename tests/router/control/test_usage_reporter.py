"""Accounts are told again and again, and what others have used is heard; nonsense is not taken."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import pytest

from faasmoe_router.control.usage_reporter import UsageReporter
from faasmoe_router.errors import ControlUnreachable
from faasmoe_router.tenants.usage import RouterUsage
from faasmoe_router.tenants.usage_store import ClusterUsage


class FakeUsageSink:
    """Answers with what it is told to; keeps the bodies."""

    def __init__(self, answer: Any) -> None:
        self.response = answer
        self.bodies: list[dict[str, Any]] = []

    async def report_usage(self, body: dict[str, Any]) -> Any:
        self.bodies.append(body)
        if isinstance(self.response, Exception):
            raise self.response
        return self.response


def usage_of(n_tokens: int) -> RouterUsage:
    usage = RouterUsage(200.0)
    usage.for_tenant("acme").prompt_tokens = n_tokens
    return usage


def totals(n_tokens: int) -> dict[str, Any]:
    return {"since_s": 100.0, "tenants": {"acme": {"prompt_tokens": n_tokens, "completed": 4}}}


def report(
    sink: FakeUsageSink, source: ClusterUsage, *, n_routers: int = 2, times: int = 1
) -> None:
    async def run() -> None:
        reporter = UsageReporter(sink, source, n_routers=lambda: n_routers)
        for _ in range(times):
            await reporter.report()

    asyncio.run(run())


def test_what_others_used_is_the_sum_less_what_was_told() -> None:
    usage = usage_of(7)
    cluster_usage = ClusterUsage(usage)
    assert cluster_usage.cluster_total("acme")["prompt_tokens"] == 7
    assert cluster_usage.remote.as_of_s is None
    sink = FakeUsageSink(totals(10))
    report(sink, cluster_usage)
    assert sink.bodies[0]["book"] == usage.ledger_id
    assert sink.bodies[0]["tenants"]["acme"]["prompt_tokens"] == 7
    whole = cluster_usage.cluster_total("acme")
    assert (whole["prompt_tokens"], whole["completed"]) == (10, 4)
    usage.for_tenant("acme").prompt_tokens = 9  # counts before it is told
    assert cluster_usage.cluster_total("acme")["prompt_tokens"] == 12
    assert cluster_usage.remote.since_s == 100.0
    assert time.time() - (cluster_usage.remote.as_of_s or 0.0) < 60


def test_a_tenant_without_use_here_sees_what_it_used_elsewhere() -> None:
    cluster_usage = ClusterUsage(RouterUsage(200.0))
    report(FakeUsageSink(totals(10)), cluster_usage)
    assert cluster_usage.cluster_total("acme")["prompt_tokens"] == 10
    assert set(cluster_usage.cluster_total("beta").values()) == {0}


def test_while_nobody_hears_the_last_sum_stands(caplog: pytest.LogCaptureFixture) -> None:
    usage = usage_of(7)
    cluster_usage = ClusterUsage(usage)
    sink = FakeUsageSink(totals(10))
    report(sink, cluster_usage)
    sink.response = ControlUnreachable("away")
    usage.for_tenant("acme").prompt_tokens = 8
    with caplog.at_level(logging.WARNING):
        report(sink, cluster_usage, times=3)
    assert cluster_usage.cluster_total("acme")["prompt_tokens"] == 11
    assert caplog.text.count("usage report failed") == 1


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param([], id="list"),
        pytest.param({"since_s": 1.0}, id="no-tenants"),
        pytest.param({"since_s": 1.0, "tenants": {"acme": 3}}, id="no-account"),
        pytest.param({"since_s": 1.0, "tenants": {"acme": {"completed": "3"}}}, id="words"),
        pytest.param({"since_s": 1.0, "tenants": {"acme": {"completed": -1}}}, id="negative"),
        pytest.param({"since_s": float("nan"), "tenants": {}}, id="nan"),
    ],
)
def test_nonsense_is_not_taken(answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    cluster_usage = ClusterUsage(usage_of(7))
    with caplog.at_level(logging.WARNING):
        report(FakeUsageSink(answer), cluster_usage)
    assert cluster_usage.cluster_total("acme")["prompt_tokens"] == 7
    assert "usage report failed" in caplog.text


def test_a_lone_router_says_nothing_while_there_is_nothing_new() -> None:
    usage = usage_of(7)
    cluster_usage = ClusterUsage(usage)
    sink = FakeUsageSink(totals(7))

    async def run() -> None:
        teller = UsageReporter(sink, cluster_usage, n_routers=lambda: 1)
        await teller.report()
        await teller.report()
        assert len(sink.bodies) == 1
        usage.for_tenant("acme").prompt_tokens = 8
        await teller.report()
        await teller.report_final()
        assert [body["ends"] for body in sink.bodies] == [False, False, True]

    asyncio.run(run())


def test_one_of_several_asks_again_though_it_has_nothing_new() -> None:
    sink = FakeUsageSink(totals(7))
    report(sink, ClusterUsage(usage_of(7)), times=3)
    assert len(sink.bodies) == 3
