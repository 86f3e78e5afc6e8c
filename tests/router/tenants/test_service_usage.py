"""Accounts by real HTTP: what a tenant has used, told to it and to Prometheus, across restarts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Until = Callable[[Callable[[], bool]], None]


def test_an_account_adds_up_what_the_answers_said(open_router: Any) -> None:
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


def test_what_was_used_through_other_routers_is_told_too(open_router: Any) -> None:
    with open_router({"acme": {}, "beta": {}}) as router:
        router.complete("acme", max_tokens=3)
        alone = router.usage("acme")
        assert alone["others_as_of"] is None
        cluster_usage = router.tenancy.cluster_usage
        told = {"acme": {"generated_tokens": 3}}
        totals = {"acme": {"generated_tokens": 10, "completed": 4}}
        cluster_usage.apply_cluster_totals(totals, reported=told, since_s=90.0, now_s=120.5)
        found = router.usage("acme")
        assert found["completion_tokens"] == 10
        assert found["requests"]["completed"] == 5
        assert (found["since"], found["others_as_of"]) == (90, 120)
        assert router.usage("beta")["completion_tokens"] == 0
        assert router.metric("generated_tokens_total", tenant="acme") == 3  # of this router


def test_prometheus_is_told_by_tenant(open_router: Any) -> None:
    with open_router({"acme": {}}) as router:
        usage = router.complete("acme", max_tokens=3).json()["usage"]
        assert router.metric("prompt_tokens_total", tenant="acme") == usage["prompt_tokens"]
        assert router.metric("generated_tokens_total", tenant="acme") == 3
        assert router.metric("requests_total", tenant="acme", outcome="completed") == 1
        text = router.get("/metrics").text
        assert 'faasmoe_tenant_expert_gb_seconds_total{tenant="acme"}' in text
        labelled = [x for x in text.splitlines() if "acme" in x]
        assert not any("function" in line or "layer" in line for line in labelled)


def test_cost_is_shared_by_the_tokens_that_were_computed_and_sums(
    open_router: Any, until: Until
) -> None:
    with open_router({"acme": {}, "beta": {}}) as router:
        router.complete("acme", max_tokens=60)
        router.complete("beta", max_tokens=20)

        def cost(tenant: str) -> float:
            return float(router.usage(tenant)["expert_gb_seconds"])

        until(lambda: cost("acme") > 0)
        until(lambda: cost("beta") > 0)
        accounts = router.tenancy._usage
        shared = sum(account.cost.gb_seconds for _, account in accounts)
        assert shared + accounts._unattributed.gb_seconds == pytest.approx(
            accounts.total_cost.gb_seconds
        )
        assert shared <= accounts.total_cost.gb_seconds


def test_a_failed_request_and_a_refused_one_are_told_apart(
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


def test_accounts_outlive_the_router(open_router: Any, tmp_path: Path) -> None:
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
