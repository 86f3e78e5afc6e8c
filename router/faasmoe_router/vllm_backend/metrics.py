"""The metrics of a router with vLLM: its own, and those of vLLM and of the calling worker."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import REGISTRY, CollectorRegistry, Metric
from prometheus_client.parser import text_string_to_metric_families


class JoinedRegistry(CollectorRegistry):
    """A registry that also collects vLLM's registry, and the last text of the worker's.

    Attributes:
        worker_text: the worker's metrics in Prometheus' text format.
    """

    def __init__(self) -> None:
        super().__init__()
        self.worker_text = ""

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        yield from super().collect()
        yield from REGISTRY.collect()
        yield from _families(self.worker_text)


def _families(text: str) -> Iterable[Metric]:
    return text_string_to_metric_families(text)
