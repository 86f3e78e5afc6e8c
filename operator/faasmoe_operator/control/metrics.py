"""The control process's metrics: aggregates, nothing of any one function."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class ControlMetrics:
    """Counters of one control process, on a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.functions = self._gauge("functions", "Functions by state.", "state")
        self.sandboxes = self._gauge("sandboxes", "Sandboxes by state.", "state")
        self.held = self._gauge("held", "Calls and requests that wait in routers.")
        self.streams = self._gauge("table_streams", "Routers that follow the function table.")
        self.tasks = self._gauge("tasks", "Tasks of the event loop.")
        self.activations = self._counter(
            "activations", "Functions brought up from zero by a wake.", "outcome"
        )
        self.wakes = self._counter("wakes", "Wakes taken.")
        self.reports = self._counter("load_reports", "Load reports taken.")
        self.refused = self._counter("refused", "Requests refused.", "code")
        self.decisions = self._counter(
            "scale_decisions", "Decisions that changed a function's replicas.", "reason"
        )
        self.actions = self._counter("actions", "Actions begun on sandboxes.", "action", "reason")
        self.failures = self._counter("sandbox_failures", "Sandboxes given up or lost.", "cause")
        self.cold_start = self._histogram(
            "cold_start_seconds", "From a wake until the function's address is in the table."
        )
        self.attach = self._histogram("attach_seconds", "Time of an attach, with its HTTP call.")

    def text(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"faasmoe_control_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"faasmoe_control_{name}_total", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"faasmoe_control_{name}", text, buckets=SECONDS, registry=self.registry)
