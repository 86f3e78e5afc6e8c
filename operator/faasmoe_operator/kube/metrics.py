"""Metrics of the operator itself, and whether each model has routers, which only it can tell.

A model without routers has nothing that could be scraped.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from faasmoe_operator.kube.conditions import READY
from faasmoe_operator.kube.types import Kind, Object

DURATION_BUCKETS_S = (
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
)


RECONCILE_OUTCOMES = ("success", "requeue", "rejected", "unavailable", "error")
ALERTED_API_CODES = ("0", "403", "429", "500", "503")


class OperatorMetrics:
    """Metrics of one operator process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "faasmoe_operator_api_requests_total",
            "API server requests, watches included; code 0 means no response, NamespaceTerminating "
            "a namespace that is being deleted, NodeTooSmall a resize beyond what the node has.",
            ("verb", "kind", "code"),
            registry=self.registry,
        )
        self.watch_events = Counter(
            "faasmoe_operator_watch_events_total",
            "Watch events received, bookmarks included, by kind.",
            ("kind",),
            registry=self.registry,
        )
        self.reconciles = Counter(
            "faasmoe_operator_reconcile_total",
            f"Reconciles of MoEModels, by outcome ({', '.join(RECONCILE_OUTCOMES)}).",
            ("outcome",),
            registry=self.registry,
        )
        for outcome in RECONCILE_OUTCOMES:
            self.reconciles.labels(outcome)
        self.reconcile_duration = Histogram(
            "faasmoe_operator_reconcile_duration_seconds",
            "Duration of one reconcile.",
            buckets=DURATION_BUCKETS_S,
            registry=self.registry,
        )
        self.queue_duration = Histogram(
            "faasmoe_operator_workqueue_queue_duration_seconds",
            "Time that a due key waited in the work queue.",
            buckets=DURATION_BUCKETS_S,
            registry=self.registry,
        )
        self.queue_depth = Gauge(
            "faasmoe_operator_workqueue_depth",
            "Keys in the work queue or being reconciled.",
            registry=self.registry,
        )
        self.models = Gauge(
            "faasmoe_operator_models",
            "MoEModels by the state of Ready.",
            ("ready", "reason"),
            registry=self.registry,
        )
        self.model_routers = Gauge(
            "faasmoe_operator_model_routers",
            "Routers of a MoEModel whose store is prepared, by state (desired, ready).",
            ("namespace", "model", "state"),
            registry=self.registry,
        )
        self.leader = Gauge(
            "faasmoe_operator_leader",
            "1 if this operator is the leader, else 0.",
            registry=self.registry,
        )

    def count_request(self, verb: str, kind: Kind, code: int | str) -> None:
        """Count a request to the API server.

        The counters of the statuses that alerts watch exist from a kind's first request on.
        """
        for alerted in ALERTED_API_CODES:
            self.requests.labels(verb, str(kind), alerted)
        self.requests.labels(verb, str(kind), str(code)).inc()

    def count_watch_event(self, kind: Kind) -> None:
        """Count a watch event, bookmarks included."""
        self.watch_events.labels(str(kind)).inc()

    def set_models(self, models: Iterable[Object]) -> None:
        """Set the gauges of models and their routers from all MoEModels."""
        models = list(models)
        tally = Tally(_ready_condition(model) for model in models)
        self.models.clear()
        self.model_routers.clear()
        for model in models:
            self._set_routers(model)
        for (ready, reason), count in tally.items():
            self.models.labels(ready, reason).set(count)

    def _set_routers(self, model: Object) -> None:
        if (routers := model.get("status", {}).get("router")) is None:
            return
        spec, meta = model["spec"], model["metadata"]
        router = spec.get("router", {})
        desired = 0 if spec.get("suspend") else router.get("replicas", 1)
        if router.get("scaling") is not None:
            desired = routers.get("replicas", 0)  # of those that requests have started
        for state, count in (("desired", desired), ("ready", routers.get("readyReplicas", 0))):
            self.model_routers.labels(meta["namespace"], meta["name"], state).set(count)

    def text(self) -> bytes:
        """Return all metrics in Prometheus's text format."""
        return generate_latest(self.registry)


def _ready_condition(model: Object) -> tuple[str, str]:
    for condition in model.get("status", {}).get("conditions", ()):
        if condition["type"] == READY:
            return condition["status"], condition["reason"]
    return "Unknown", "NotReconciled"
