"""Metrics of the gateway: what alerts use is there at 0, and what is gone is dropped."""

from __future__ import annotations

from prometheus_client import generate_latest

from faasmoe_gateway.metrics import (
    BUDGET,
    FAILED,
    NO_ROUTER,
    GatewayMetrics,
    GatewayState,
    RequestRecord,
)
from faasmoe_gateway.refusal import Refusal


def sample(metrics: GatewayMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_combinations_that_alerts_use_exist_at_zero() -> None:
    metrics = GatewayMetrics()
    metrics.configure(["llm/chat"], ["acme"])
    for model in ("", "llm/chat"):
        labels = {"model": model, "outcome": FAILED, "reason": NO_ROUTER}
        assert sample(metrics, "faasmoe_gateway_requests_total", **labels) == 0
    labels = {"tenant": "acme", "outcome": FAILED, "reason": NO_ROUTER}
    assert sample(metrics, "faasmoe_gateway_tenant_requests_total", **labels) == 0
    refusals = "faasmoe_gateway_limit_refusals_total"
    assert sample(metrics, refusals, tenant="acme", limit=BUDGET) == 0
    assert sample(metrics, "faasmoe_gateway_wait_seconds_count", model="llm/chat") == 0


def test_requests_are_counted_by_how_they_end() -> None:
    metrics = GatewayMetrics()
    metrics.configure(["m"], ["acme"])
    refused = RequestRecord(0.0, tenant="acme")
    refused.refuse(Refusal("no", status=429, code="rate_limit_exceeded", limit="tokens"))
    answered = RequestRecord(0.0, tenant="acme", model="m", overhead_s=0.001, waited_s=2.0)
    answered.read_status(200)
    failed = RequestRecord(0.0, tenant="nobody", model="gone", overhead_s=0.0)
    failed.read_status(502)
    for record in (refused, answered, failed):
        metrics.count(record)
    name = "faasmoe_gateway_requests_total"
    assert sample(metrics, name, model="m", outcome="answered", reason="") == 1
    assert sample(metrics, name, model="", outcome="failed", reason="router_error") == 1
    assert sample(metrics, name, model="", outcome="refused", reason="rate_limit_exceeded") == 1
    assert (
        sample(metrics, "faasmoe_gateway_limit_refusals_total", tenant="acme", limit="tokens") == 1
    )
    assert sample(metrics, "faasmoe_gateway_overhead_seconds_count") == 2
    assert sample(metrics, "faasmoe_gateway_wait_seconds_sum", model="m") == 2.0


def test_models_and_tenants_that_are_gone_are_dropped() -> None:
    metrics = GatewayMetrics()
    metrics.configure(["m"], ["acme"])
    metrics.count(RequestRecord(0.0, tenant="acme", model="m", outcome="refused", reason="odd"))
    metrics.configure([], [])
    text = generate_latest(metrics.registry).decode()
    assert 'model="m"' not in text
    assert "acme" not in text


def test_state_is_read_when_it_is_asked_for() -> None:
    metrics, links = GatewayMetrics(), {"leases": True}
    metrics.registry.register(
        GatewayState(
            waiting=lambda: [("m", 3)],
            held_bytes=lambda: 7,
            connected=links.items,
            lease_age_s=lambda: float("inf"),
        )
    )
    assert sample(metrics, "faasmoe_gateway_waiting_requests", model="m") == 3
    assert sample(metrics, "faasmoe_gateway_held_bytes") == 7
    assert sample(metrics, "faasmoe_gateway_control_connected", purpose="leases") == 1
    links["leases"] = False
    assert sample(metrics, "faasmoe_gateway_control_connected", purpose="leases") == 0
    assert sample(metrics, "faasmoe_gateway_lease_age_seconds") == float("inf")
