"""Prometheus metrics of tenants, collected from their usage counters at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from faasmoe_router.tenants.usage import RouterUsage


class TenantCollector(Collector):
    """Collects the metrics of all tenants; none names an expert function.

    Args:
        usage: usage through this router.
        sequences: returns the running and waiting sequences of each tenant.
        n_keys: returns the number of API keys of each tenant.
    """

    def __init__(
        self,
        usage: RouterUsage,
        *,
        sequences: Callable[[], Mapping[str, tuple[int, int]]],
        n_keys: Callable[[], Mapping[str, int]],
    ) -> None:
        self._usage = usage
        self._sequences = sequences
        self._n_keys = n_keys

    def register(self, registry: CollectorRegistry) -> None:
        """Add this collector to a registry."""
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        yield from self._usage_metrics()
        yield from self._state_metrics()

    def _usage_metrics(self) -> Iterator[Metric]:
        prompt = _tenant_counter("prompt_tokens", "Tokens of prompts.")
        generated = _tenant_counter("generated_tokens", "Tokens generated.")
        requests = _tenant_counter("requests", "Requests by outcome.", "outcome")
        seconds = _tenant_counter("expert_seconds", "Attributed time of expert functions in use.")
        gb_seconds = _tenant_counter(
            "expert_gb_seconds", "Attributed time of expert functions in use, times their size."
        )
        for name, tenant_usage in self._usage:
            prompt.add_metric([name], tenant_usage.prompt_tokens)
            generated.add_metric([name], tenant_usage.generated_tokens)
            seconds.add_metric([name], tenant_usage.cost.seconds)
            gb_seconds.add_metric([name], tenant_usage.cost.gb_seconds)
            for outcome, count in tenant_usage.requests.items():
                requests.add_metric([name, outcome], count)
        yield from (prompt, generated, requests, seconds, gb_seconds)
        total_cost = self._usage.total_cost
        for unit, total in (("seconds", total_cost.seconds), ("gb_seconds", total_cost.gb_seconds)):
            family = CounterMetricFamily(
                f"faasmoe_router_expert_{unit}", "Expert function cost attributed to tenants."
            )
            family.add_metric([], total)
            yield family

    def _state_metrics(self) -> Iterator[Metric]:
        running = GaugeMetricFamily(
            "faasmoe_tenant_running_sequences", "Sequences being computed.", labels=["tenant"]
        )
        waiting = GaugeMetricFamily(
            "faasmoe_tenant_waiting_sequences", "Sequences waiting for a slot.", labels=["tenant"]
        )
        for name, (n_running, n_waiting) in self._sequences().items():
            running.add_metric([name], n_running)
            waiting.add_metric([name], n_waiting)
        keys = GaugeMetricFamily("faasmoe_tenant_keys", "Valid API keys.", labels=["tenant"])
        for name, count in self._n_keys().items():
            keys.add_metric([name], count)
        yield from (running, waiting, keys)


def _tenant_counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"faasmoe_tenant_{name}", text, labels=["tenant", *labels])


class OwnMetrics(Collector):
    """What one tenant may see of a registry: everything that is not of another tenant.

    Args:
        registry: the metrics.
        tenant: the tenant.
    """

    def __init__(self, registry: CollectorRegistry, tenant: str) -> None:
        self._registry = registry
        self._tenant = tenant

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        for family in self._registry.collect():
            family.samples = [
                sample._replace(exemplar=None)  # it names a trace, perhaps another tenant's
                for sample in family.samples
                if sample.labels.get("tenant", self._tenant) == self._tenant
            ]
            yield family
