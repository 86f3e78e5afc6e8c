"""The tenants' metrics, read from their accounts when Prometheus asks: sums, nothing of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from faasmoe_router.tenants.usage import Accounts


class TenantCollector(Collector):
    """Tells of all tenants.

    Args:
        accounts: what they have used.
        sequences: how many of each tenant's sequences run and wait now.
        n_keys: how many keys each has now.
    """

    def __init__(
        self,
        accounts: Accounts,
        *,
        sequences: Callable[[], Mapping[str, tuple[int, int]]],
        n_keys: Callable[[], Mapping[str, int]],
    ) -> None:
        self._accounts = accounts
        self._sequences = sequences
        self._n_keys = n_keys

    def register(self, registry: CollectorRegistry) -> None:
        """Have the registry ask."""
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        yield from self._used()
        yield from self._now()

    def _used(self) -> Iterator[Metric]:
        prompt = _counter("prompt_tokens", "Tokens of prompts.")
        generated = _counter("generated_tokens", "Tokens generated.")
        requests = _counter("requests", "Requests, by how they ended.", "outcome")
        seconds = _counter("expert_seconds", "The part of the time that functions were in use.")
        size = _counter("expert_gb_seconds", "The same, times the functions' sizes.")
        for name, account in self._accounts:
            prompt.add_metric([name], account.prompt_tokens)
            generated.add_metric([name], account.generated_tokens)
            seconds.add_metric([name], account.cost.seconds)
            size.add_metric([name], account.cost.gb_seconds)
            for outcome, count in account.requests.items():
                requests.add_metric([name, outcome], count)
        yield from (prompt, generated, requests, seconds, size)
        spent = self._accounts.spent
        for what, total in (("seconds", spent.seconds), ("gb_seconds", spent.gb_seconds)):
            family = CounterMetricFamily(
                f"faasmoe_router_expert_{what}", "What is shared out among the tenants."
            )
            family.add_metric([], total)
            yield family

    def _now(self) -> Iterator[Metric]:
        running = GaugeMetricFamily(
            "faasmoe_tenant_running", "Sequences that are computed.", labels=["tenant"]
        )
        waiting = GaugeMetricFamily(
            "faasmoe_tenant_waiting", "Sequences that wait for a slot.", labels=["tenant"]
        )
        for name, (n_running, n_waiting) in self._sequences().items():
            running.add_metric([name], n_running)
            waiting.add_metric([name], n_waiting)
        keys = GaugeMetricFamily("faasmoe_tenant_keys", "API keys in force.", labels=["tenant"])
        for name, count in self._n_keys().items():
            keys.add_metric([name], count)
        yield from (running, waiting, keys)


def _counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"faasmoe_tenant_{name}", text, labels=["tenant", *labels])
