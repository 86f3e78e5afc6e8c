"""Aggregate Prometheus metrics of dispatch.

No label identifies a layer, an expert, a request or a tenant.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

LATENCY_BUCKETS_S = (
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0, 3.0, 10.0,
)  # fmt: skip


class DispatchMetrics:
    """Metrics of one dispatcher, registered on `registry` or on one of their own."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        self.calls = Counter(
            "faasmoe_router_function_calls_total", "Calls to functions.", registry=registry
        )
        self.mailbox_calls = Counter(
            "faasmoe_router_mailbox_calls_total",
            "Calls to functions over mailboxes, without Python.",
            registry=registry,
        )
        self.failed_calls = Counter(
            "faasmoe_router_function_call_failures_total",
            "Failed calls to functions.",
            registry=registry,
        )
        self.retries = Counter(
            "faasmoe_router_function_call_retries_total",
            "Retries of failed calls at another replica.",
            registry=registry,
        )
        self.hedges = Counter(
            "faasmoe_router_function_call_hedges_total",
            "Hedged calls at another replica.",
            registry=registry,
        )
        self.ejected = Gauge(
            "faasmoe_router_ejected_addresses",
            "Addresses ejected by outlier detection.",
            registry=registry,
        )
        self.local = Counter(
            "faasmoe_router_local_computations_total",
            "Calls computed by local fallback because no sandbox responded.",
            registry=registry,
        )
        self.colocated = Counter(
            "faasmoe_router_colocated_computations_total",
            "Calls computed in the router: to colocated functions, and to those without a place in "
            "limited memory.",
            registry=registry,
        )
        self.queued = Gauge(
            "faasmoe_router_queued_calls",
            "Calls queued for the activation of their function.",
            registry=registry,
        )
        self.sent_bytes = Counter(
            "faasmoe_router_function_sent_bytes_total",
            "Bytes of request frames.",
            registry=registry,
        )
        self.received_bytes = Counter(
            "faasmoe_router_function_received_bytes_total",
            "Bytes of response frames.",
            registry=registry,
        )
        self.layer_seconds = Histogram(
            "faasmoe_router_layer_seconds",
            "Time of a MoE layer from dispatch to its combined output.",
            buckets=LATENCY_BUCKETS_S,
            registry=registry,
        )
