"""Prometheus metrics of the control process: aggregates only, no label names a function.

Replicas follow calls, and calls the gates' choices, so those of a layer are what the live page may
show: of windows of many tokens, once these have passed.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from faasmoe_operator.plan.actions import ActionReason
from faasmoe_operator.scaling import Reason

DURATION_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
SANDBOX_ACTIONS = ("create", "delete", "attach", "detach")
SANDBOX_FAILURE_CAUSES = (
    *("create", "start", "lost", "attach", "detach", "corrupted", "out_of_memory"),
    *("assignment_drift", "protocol_error", "unresponsive"),
)
REJECTION_CODES = ("unauthorized", "too_large", "not_found", "bad_method", "invalid", "refused")


class ControlPlaneMetrics:
    """Metrics of one model's controller, in their own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.functions = self._gauge("functions", "Functions by state.", "state")
        self.layer_replicas = self._gauge(
            "layer_replicas",
            "Replicas of a layer's functions, shown late and over many tokens (docs/live-page.md).",
            "layer",
        )
        self.sandboxes = self._gauge("sandboxes", "Sandboxes by state.", "state")
        self.queue_depth = self._gauge("queue_depth", "Calls and requests queued in routers.")
        self.routing_table_watchers = self._gauge(
            "routing_table_watchers", "Routers that watch the routing table."
        )
        self.event_loop_tasks = self._gauge("event_loop_tasks", "Tasks of the event loop.")
        self.activations = self._counter(
            "activations",
            "Activations of functions at zero: ready, or timed_out after the activation deadline.",
            outcome=("ready", "timed_out"),
        )
        self.activation_requests = self._counter(
            "activation_requests", "Activation requests received."
        )
        self.load_reports = self._counter("load_reports", "Load reports received.")
        self.rejected_requests = self._counter(
            "rejected_requests", "API requests rejected.", code=REJECTION_CODES
        )
        self.scale_decisions = self._counter(
            "scale_decisions", "Decisions that changed a function's replicas.", reason=Reason
        )
        self.sandbox_actions = self._counter(
            "sandbox_actions",
            "Actions started on sandboxes.",
            action=SANDBOX_ACTIONS,
            reason=ActionReason,
        )
        self.sandbox_failures = self._counter(
            "sandbox_failures",
            "Sandboxes that failed or were lost.",
            cause=SANDBOX_FAILURE_CAUSES,
        )
        self.cold_start_seconds = self._histogram(
            "cold_start_seconds",
            "From activation request until the function's address is in the routing table.",
        )
        self.attach_seconds = self._histogram(
            "attach_seconds", "Duration of an attach, HTTP call included."
        )

    def render(self) -> bytes:
        """Return all metrics in the Prometheus text format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, help_text: str, *labels: str) -> Gauge:
        return Gauge(f"faasmoe_control_{name}", help_text, labels, registry=self.registry)

    def _counter(self, name: str, help_text: str, **labels: Iterable[str]) -> Counter:
        """Create a counter that exists at 0 for all combinations of these label values."""
        counter = Counter(
            f"faasmoe_control_{name}_total", help_text, tuple(labels), registry=self.registry
        )
        for values in product(*labels.values()) if labels else ():
            counter.labels(*values)
        return counter

    def _histogram(self, name: str, help_text: str) -> Histogram:
        return Histogram(
            f"faasmoe_control_{name}", help_text, buckets=DURATION_BUCKETS_S, registry=self.registry
        )
