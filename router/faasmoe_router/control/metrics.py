"""Prometheus metrics of the link to the control plane: aggregates without labels."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

COLD_START_BUCKETS_S = (
    0.05,
    0.1,
    0.2,
    0.3,
    0.5,
    0.75,
    1.0,
    1.5,
    2.0,
    3.0,
    5.0,
    10.0,
    20.0,
    30.0,
    60.0,
    120.0,
)


class ControlLinkMetrics:
    """Metrics of one link.

    Args:
        registry: where to register them; None for a registry of their own.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        self.queued_requests = Gauge(
            "faasmoe_router_queued_requests",
            "Requests queued for the activation of functions.",
            registry=registry,
        )
        self.activation_requests = Counter(
            "faasmoe_router_activation_requests_total",
            "Activation requests sent to the control plane.",
            registry=registry,
        )
        self.cold_start_seconds = Histogram(
            "faasmoe_router_cold_start_seconds",
            "Time that queued requests waited for activation.",
            buckets=COLD_START_BUCKETS_S,
            registry=registry,
        )
        self.local_fallback_functions = Gauge(
            "faasmoe_router_local_fallback_functions",
            "Unavailable functions that the router computes locally.",
            registry=registry,
        )
        self.local_fallback_admissions = Counter(
            "faasmoe_router_local_fallback_admissions_total",
            "Requests admitted with local fallback after activation timed out.",
            registry=registry,
        )
        self.connected = Gauge(
            "faasmoe_router_control_connected",
            "1 while the routing table watch is connected.",
            registry=registry,
        )
        self.routing_table_version = Gauge(
            "faasmoe_router_routing_table_version",
            "Version of the routing table in use.",
            registry=registry,
        )
