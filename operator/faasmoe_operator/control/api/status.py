"""State of controllers: as JSON for `faasmoe top`, and as Prometheus metrics.

The operator exports the metrics of all its models in one text, labelled with namespace and name, up
to a number of models that keeps a scrape affordable; further models are only counted.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.fleet import SandboxRecord
from faasmoe_operator.platforms.memory import pss_bytes


async def controller_status(controller: Controller) -> dict[str, Any]:
    """Return a controller's state as the body of GET /v1/status."""
    now = controller.clock()
    routing_table = controller.routing_table
    records = list(controller.fleet.sandboxes)
    pool_size, n_generic = controller.generic_sandboxes()
    pids = [record.sandbox.pid for record in records]
    memory = await asyncio.to_thread(lambda: [pid and pss_bytes(pid) for pid in pids])
    return {
        "model": controller.model.name,
        "epoch": routing_table.epoch,
        "version": routing_table.version,
        "followers": routing_table.n_watchers,
        "functions": _function_status(controller, now=now),
        "sandboxes": [
            _sandbox_status(record, size, n_models=controller.n_models(record.sandbox.id))
            for record, size in zip(records, memory, strict=True)
        ],
        "pool": {"size": pool_size, "ready": n_generic},
        "held": controller.load_reports.queued(now),
        "failure": controller.failure,
        "decisions": _decision_counts(controller),
    }


def update_gauges(controller: Controller) -> None:
    """Set a controller's gauges to its current state."""
    metrics, autoscalers = controller.metrics, controller.autoscalers
    phases = Counter(autoscalers.phase(name).value for name in controller.model.functions)
    sandboxes = controller.fleet.sandbox_states()
    metrics.functions.clear()
    for phase, count in phases.items():
        metrics.functions.labels(phase).set(count)
    metrics.layer_replicas.clear()
    for layer, count in controller.activity.window.layer_replicas().items():
        metrics.layer_replicas.labels(layer).set(count)
    metrics.sandboxes.clear()
    for state, count in sandboxes.items():
        metrics.sandboxes.labels(state.value).set(count)
    metrics.queue_depth.set(controller.load_reports.queued(controller.clock()))
    metrics.routing_table_watchers.set(controller.routing_table.n_watchers)
    metrics.event_loop_tasks.set(len(asyncio.all_tasks()))


def _function_status(controller: Controller, *, now: float) -> list[dict[str, Any]]:
    ready = controller.fleet.ready_replicas()
    stats, autoscalers = controller.function_stats, controller.autoscalers
    return [
        {
            "id": name,
            "layers": list(function.spec.layers),
            "n_experts": len(function.spec.experts),
            "size_bytes": function.size_bytes,
            "state": autoscalers.phase(name).value,
            "desired": autoscalers.desired(name),
            "ready": ready.get(name, 0),
            "concurrency": autoscalers.concurrency(name, now=now),
            "idle_s": stats.idle_s(name, now=now),
            "calls": stats.calls[name],
            "rows": stats.rows[name],
        }
        for name, function in controller.model.functions.items()
    ]


def _sandbox_status(
    record: SandboxRecord, size_bytes: int | None, *, n_models: int
) -> dict[str, Any]:
    """Return a sandbox's state; of a process that models share, each has an equal part."""
    return {
        "id": record.sandbox.id,
        "address": record.sandbox.address,
        "pid": record.sandbox.pid,
        "state": record.state.value,
        "ready": record.sandbox.ready,
        "functions": list(record.functions),
        "models": n_models,
        "pss_bytes": size_bytes and size_bytes // n_models,
    }


def _decision_counts(controller: Controller) -> dict[str, int]:
    samples = (s for m in controller.metrics.scale_decisions.collect() for s in m.samples)
    counts = {s.labels["reason"]: int(s.value) for s in samples if s.name.endswith("_total")}
    return {reason: count for reason, count in counts.items() if count}


MAX_MODELS = 500

NamedController = tuple[tuple[str, str], Controller]
"""A model's namespace and name, and its controller."""


def render_models_metrics(
    models: Iterable[NamedController], *, n_processes: int | None = None
) -> bytes:
    """Return the metrics of these models in Prometheus's text format.

    Args:
        models: models and controllers, sorted by namespace and name.
        n_processes: number of processes of sandboxes, which models share; None if they do not.
    """
    registry = CollectorRegistry()
    registry.register(_ModelsCollector(models))
    if n_processes is not None:
        name, help_text = "faasmoe_control_sandbox_processes", "Processes of all models' sandboxes."
        Gauge(name, help_text, registry=registry).set(n_processes)
    return generate_latest(registry)


class _ModelsCollector(Collector):
    def __init__(self, models: Iterable[NamedController]) -> None:
        self._models = iter(models)

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for (namespace, name), controller in islice(self._models, MAX_MODELS):
            update_gauges(controller)
            for metric in controller.metrics.registry.collect():
                family = families.setdefault(
                    metric.name, Metric(metric.name, metric.documentation, metric.type)
                )
                for sample in metric.samples:
                    labels = {"namespace": namespace, "model": name, **sample.labels}
                    family.samples.append(sample._replace(labels=labels))
        yield from families.values()
        n_not_exported = sum(1 for _ in self._models)
        help_text = f"Models beyond the first {MAX_MODELS}, whose metrics are not exported."
        yield GaugeMetricFamily(
            "faasmoe_control_models_not_exported", help_text, value=n_not_exported
        )

    def describe(self) -> Iterator[Metric]:
        """Return nothing, because registration would otherwise collect all metrics once."""
        return iter(())
