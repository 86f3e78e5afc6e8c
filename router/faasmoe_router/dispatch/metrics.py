"""Counters of dispatch, in aggregate: no label tells a layer, an expert, a request or a tenant."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0, 3.0, 10.0)


class DispatchMetrics:
    """Counters of one dispatcher."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        self.calls = Counter(
            "faasmoe_router_function_calls_total", "Calls to functions.", registry=registry
        )
        self.failed_calls = Counter(
            "faasmoe_router_function_call_failures_total",
            "Calls to functions that gave no answer.",
            registry=registry,
        )
        self.retries = Counter(
            "faasmoe_router_function_call_retries_total",
            "Calls made at another replica after one that failed.",
            registry=registry,
        )
        self.hedges = Counter(
            "faasmoe_router_function_call_hedges_total",
            "Calls made at another replica beside one that took long.",
            registry=registry,
        )
        self.ejected = Gauge(
            "faasmoe_router_ejected_addresses",
            "Addresses that get no calls until a probe finds them well.",
            registry=registry,
        )
        self.local = Counter(
            "faasmoe_router_local_computations_total",
            "Calls computed in the router because no sandbox answered.",
            registry=registry,
        )
        self.here = Counter(
            "faasmoe_router_hot_computations_total",
            "Calls computed in the router because that was measured to take less time.",
            registry=registry,
        )
        self.held = Gauge(
            "faasmoe_router_held_calls",
            "Calls that wait for their function to be started.",
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
            "Time from a layer's routing to its sum.",
            buckets=SECONDS,
            registry=registry,
        )
