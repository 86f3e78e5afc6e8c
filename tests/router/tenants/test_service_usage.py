"""Usage over HTTP: the usage endpoint, Prometheus metrics, cost attribution and restarts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faasmoe_contracts.usage import ClusterTotals, UsageRecord

Until = Callable[[Callable[[], bool]], None]


def test_usage_is_the_sum_of_the_responses(open_router: Any) -> None:
    with open_router({"acme": {}, "beta": {}}) as router:
        answers = [router.complete("acme", n=2, max_tokens=n).json()["usage"] for n in (3, 5)]
        router.complete("beta", max_tokens=1)
        found = router.usage("acme")
        assert found["tenant"] == "acme"
        for field in ("prompt_tokens", "completion_tokens", "total_tokens"):
            assert found[field] == sum(answer[field] for answer in answers)
        assert found["requests"] == {"completed": 2, "cancelled": 0, "failed": 0, "limited": 0}
        assert router.get("/acme/v1/usage", key="acme-key").json()["tenant"] == "acme"
        assert router.get("/beta/v1/usage", key="acme-key").status_code == 401
        assert router.usage("beta")["completion_tokens"] == 1


def test_usage_includes_other_routers(open_router: Any) -> None:
    with open_router({"acme": {}, "beta": {}}) as router:
        router.complete("acme", max_tokens=3)
        alone = router.usage("acme")
        assert alone["others_as_of"] is None
        cluster_usage = router.tenancy.cluster_usage
        reported = {"acme": UsageRecord(generated_tokens=3)}
        totals = ClusterTotals(90.0, {"acme": UsageRecord(generated_tokens=10, completed=4)})
        cluster_usage.apply_cluster_totals(totals, reported=reported, now_s=120.5)
        found = router.usage("acme")
        assert found["completion_tokens"] == 10
        assert found["requests"]["completed"] == 5
        assert (found["since"], found["others_as_of"]) == (90, 120)
        assert router.usage("beta")["completion_tokens"] == 0
        assert router.metric("generated_tokens_total", tenant="acme") == 3  # through this router


def test_metrics_are_labelled_with_the_tenant_and_no_function(open_router: Any) -> None:
    with open_router({"acme": {}}) as router:
        usage = router.complete("acme", max_tokens=3).json()["usage"]
        assert router.metric("prompt_tokens_total", tenant="acme") == usage["prompt_tokens"]
        assert router.metric("generated_tokens_total", tenant="acme") == 3
        assert router.metric("requests_total", tenant="acme", outcome="completed") == 1
        text = router.get("/metrics", key="acme-key").text
        assert 'faasmoe_tenant_expert_gb_seconds_total{tenant="acme"}' in text
        labelled = [x for x in text.splitlines() if "acme" in x]
        assert not any("function" in line or "layer" in line for line in labelled)


def test_cost_is_attributed_by_computed_tokens_and_adds_up(open_router: Any, until: Until) -> None:
    with open_router({"acme": {}, "beta": {}}) as router:
        router.complete("acme", max_tokens=60)
        router.complete("beta", max_tokens=20)

        def cost(tenant: str) -> float:
            return float(router.usage(tenant)["expert_gb_seconds"])

        until(lambda: cost("acme") > 0)
        until(lambda: cost("beta") > 0)
        usage = router.usage_counters
        attributed = sum(tenant.cost.gb_seconds for _, tenant in usage)
        unattributed = usage.to_json()["pending"]["gb_seconds"]
        assert attributed + unattributed == pytest.approx(usage.total_cost.gb_seconds)
        assert attributed <= usage.total_cost.gb_seconds


def test_failed_requests_are_counted_apart_from_completed_ones(
    open_router: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"requestsPerMinute": 2}
    with open_router({"acme": {"limits": limits}}) as router:
        router.complete("acme")

        def break_down(*_: Any, **__: Any) -> None:
            raise RuntimeError("broken")

        monkeypatch.setattr(router.engine._model, "forward", break_down)
        assert router.complete("acme").status_code == 500
        assert router.complete("acme").status_code in (429, 503)
        requests = router.usage("acme")["requests"]
        assert (requests["completed"], requests["failed"]) == (1, 1)


def test_usage_survives_a_restart_of_the_router(open_router: Any, tmp_path: Path) -> None:
    with open_router({"acme": {}}, state_dir=tmp_path) as router:
        router.complete("acme", max_tokens=7)
        before = router.usage("acme")
    assert json.loads((tmp_path / "usage.json").read_text())["tenants"]["acme"]
    with open_router({"acme": {}}, state_dir=tmp_path) as router:
        after = router.usage("acme")
        for field in ("prompt_tokens", "completion_tokens", "requests", "since"):
            assert after[field] == before[field]
        router.complete("acme", max_tokens=7)
        assert router.usage("acme")["completion_tokens"] == 14
        assert router.metric("generated_tokens_total", tenant="acme") == 14
