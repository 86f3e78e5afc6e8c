"""The operator's own metrics: its work and its requests, nothing of any one model."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from faasmoe_operator.kube.conditions import READY
from faasmoe_operator.kube.kinds import Kind, Object

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class OperatorMetrics:
    """Counters of one operator process, on a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "faasmoe_operator_api_requests_total",
            "Requests to the API server but watches; code 0 for those that got no answer.",
            ("verb", "kind", "code"),
            registry=self.registry,
        )
        self.watch_events = Counter(
            "faasmoe_operator_watch_events_total",
            "Events that the API server told of, by kind.",
            ("kind",),
            registry=self.registry,
        )
        self.reconciles = Counter(
            "faasmoe_operator_reconciles_total",
            "Visits to MoEModels, by what came of them.",
            ("outcome",),
            registry=self.registry,
        )
        self.reconcile_time = Histogram(
            "faasmoe_operator_reconcile_duration_seconds",
            "Time of a visit.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.queue_latency = Histogram(
            "faasmoe_operator_queue_latency_seconds",
            "From when a visit was due until it began.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.queue_depth = Gauge(
            "faasmoe_operator_queue_depth",
            "MoEModels that are due or visited.",
            registry=self.registry,
        )
        self.models = Gauge(
            "faasmoe_operator_models",
            "MoEModels by the state of Ready.",
            ("ready", "reason"),
            registry=self.registry,
        )
        self.leading = Gauge(
            "faasmoe_operator_leading",
            "1 if this operator looks after the models, 0 if another does.",
            registry=self.registry,
        )

    def count_request(self, verb: str, kind: Kind, status: int) -> None:
        """Count a request to the API server."""
        self.requests.labels(verb, str(kind), str(status)).inc()

    def count_models(self, models: Iterable[Object]) -> None:
        """Set the gauge of models to what there is."""
        tally = Tally(_ready(model) for model in models)
        self.models.clear()
        for (ready, reason), count in tally.items():
            self.models.labels(ready, reason).set(count)

    def text(self) -> bytes:
        """Return everything in Prometheus's text format."""
        return generate_latest(self.registry)


def _ready(model: Object) -> tuple[str, str]:
    for condition in model.get("status", {}).get("conditions", ()):
        if condition["type"] == READY:
            return condition["status"], condition["reason"]
    return "Unknown", "NotVisited"
