"""What the router counts of its link to the control plane; aggregates, no label."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)


class ControlMetrics:
    """Counters of one link."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        self.held_requests = Gauge(
            "faasmoe_router_held_requests",
            "Requests that wait for functions to be started.",
            registry=registry,
        )
        self.wakes = Counter(
            "faasmoe_router_wakes_total",
            "Calls that asked the control plane for functions.",
            registry=registry,
        )
        self.cold_start_seconds = Histogram(
            "faasmoe_router_cold_start_seconds",
            "How long requests waited for functions to be started, if they did, until they went.",
            buckets=SECONDS,
            registry=registry,
        )
        self.stand_ins = Gauge(
            "faasmoe_router_stand_ins",
            "Functions that could not be had and that the router computes itself.",
            registry=registry,
        )
        self.stand_in_admissions = Counter(
            "faasmoe_router_stand_in_admissions_total",
            "Requests that waited for functions in vain and were let in without them.",
            registry=registry,
        )
        self.connected = Gauge(
            "faasmoe_router_control_connected",
            "Whether the function table is followed.",
            registry=registry,
        )
        self.table_version = Gauge(
            "faasmoe_router_table_version",
            "Version of the function table in use.",
            registry=registry,
        )
