"""The metrics of many models in one text: each model's own, with its name as labels.

The first so many models by name are told apart; the rest would cost a scrape more than it tells,
and are counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from faasmoe_operator.control.api.status import update_gauges
from faasmoe_operator.control.controller import Controller

MAX_MODELS = 500

Named = tuple[tuple[str, str], Controller]
"""A model's namespace and name, and its controller."""


def models_metrics(models: Iterable[Named]) -> bytes:
    """Return the metrics of these models in Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(_Models(models))
    return generate_latest(registry)


class _Models(Collector):
    def __init__(self, models: Iterable[Named]) -> None:
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
        left_out = sum(1 for _ in self._models)
        help_text = f"Models beyond the first {MAX_MODELS}, whose metrics are left out."
        yield GaugeMetricFamily("faasmoe_control_models_left_out", help_text, value=left_out)

    def describe(self) -> Iterator[Metric]:
        """Say nothing beforehand: registering would ask for everything once."""
        return iter(())
