"""The control's state as JSON, for `faasmoe top`; and its gauges.

The metrics of many models in one text: each model's own, with its name as labels.

The first so many models by name are told apart; the rest would cost a scrape more than it tells,
and are counted.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.fleet import SandboxRecord
from faasmoe_operator.platforms.process import pss_bytes


async def controller_status(controller: Controller) -> dict[str, Any]:
    """Return the whole state."""
    now = controller.clock()
    routing_table = controller.routing_table
    members = list(controller.fleet.sandboxes)
    pids = [member.sandbox.pid for member in members]
    memory = await asyncio.to_thread(lambda: [pid and pss_bytes(pid) for pid in pids])
    return {
        "model": controller.model.name,
        "epoch": routing_table.epoch,
        "version": routing_table.version,
        "followers": routing_table.n_watchers,
        "functions": _function_status(controller, now=now),
        "sandboxes": [_sandbox_status(m, size) for m, size in zip(members, memory, strict=True)],
        "pool": {"size": controller.model.warm_pool, "ready": controller.fleet.n_generic()},
        "held": controller.load_reports.queued(now),
        "decisions": _decision_counts(controller),
    }


def update_gauges(controller: Controller) -> None:
    """Set the gauges to the present state."""
    metrics, autoscalers = controller.metrics, controller.autoscalers
    phases = Counter(autoscalers.phase(name).value for name in controller.model.functions)
    sandboxes = controller.fleet.sandbox_states()
    metrics.functions.clear()
    for phase, count in phases.items():
        metrics.functions.labels(phase).set(count)
    metrics.sandboxes.clear()
    for state, count in sandboxes.items():
        metrics.sandboxes.labels(state.value).set(count)
    metrics.queue_depth.set(controller.load_reports.queued(controller.clock()))
    metrics.routing_table_watchers.set(controller.routing_table.n_watchers)
    metrics.event_loop_tasks.set(len(asyncio.all_tasks()))


def _function_status(controller: Controller, *, now: float) -> list[dict[str, Any]]:
    ready, records, scalers = (
        controller.fleet.ready_replicas(),
        controller.function_stats,
        controller.autoscalers,
    )
    return [
        {
            "id": name,
            "layers": list(function.spec.layers),
            "n_experts": len(function.spec.experts),
            "size_bytes": function.size_bytes,
            "state": scalers.phase(name).value,
            "desired": scalers.desired(name),
            "ready": ready.get(name, 0),
            "concurrency": scalers.concurrency(name, now=now),
            "idle_s": records.idle_s(name, now=now),
            "calls": records.calls[name],
            "rows": records.rows[name],
        }
        for name, function in controller.model.functions.items()
    ]


def _sandbox_status(member: SandboxRecord, size_bytes: int | None) -> dict[str, Any]:
    return {
        "id": member.sandbox.id,
        "address": member.sandbox.address,
        "pid": member.sandbox.pid,
        "state": member.state.value,
        "ready": member.sandbox.ready,
        "functions": list(member.functions),
        "pss_bytes": size_bytes,
    }


def _decision_counts(controller: Controller) -> dict[str, int]:
    samples = (s for m in controller.metrics.scale_decisions.collect() for s in m.samples)
    return {s.labels["reason"]: int(s.value) for s in samples if s.name.endswith("_total")}


MAX_MODELS = 500

NamedController = tuple[tuple[str, str], Controller]
"""A model's namespace and name, and its controller."""


def render_models_metrics(models: Iterable[NamedController]) -> bytes:
    """Return the metrics of these models in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(_ModelsCollector(models))
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
        """Say nothing beforehand: registering would ask for everything once."""
        return iter(())
