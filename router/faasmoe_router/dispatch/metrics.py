"""Aggregate Prometheus metrics of dispatch.

No label identifies a layer, an expert, a request or a tenant. Calls and their bytes follow the
gates' choices: how many functions a token calls tells something of which token it was. So they are
shown as sums over many tokens, once these have passed; what fails is shown at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

LATENCY_BUCKETS_S = (
    0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0, 3.0, 10.0,
)  # fmt: skip


class WindowedCollector(Collector):
    """Shows metrics as they were when the last window of tokens was full.

    Args:
        registry: has the metrics.

    Attributes:
        before_taking: brings the metrics up to date; called from any thread.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.before_taking: Callable[[], object] = lambda: None
        self._registry = registry
        self._read_tokens: Callable[[], float] | None = None
        self._min_tokens = 0
        self._shown_tokens = 0.0
        self._families: list[Metric] = []

    def show_late(self, read_tokens: Callable[[], float], *, min_tokens: int) -> None:
        """Begin with windows: until now everything was shown at once.

        Args:
            read_tokens: returns the tokens computed so far.
            min_tokens: tokens of a window; 1 shows everything at once, as before.
        """
        if min_tokens == 1:
            return
        self._read_tokens, self._min_tokens = read_tokens, min_tokens
        self._take()

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the last window."""
        if (
            self._read_tokens is None
            or self._read_tokens() - self._shown_tokens >= self._min_tokens
        ):
            self._take()
        yield from map(copy.copy, self._families)

    def describe(self) -> Iterator[Metric]:
        """Yield the metrics, whatever they count."""
        yield from self._registry.collect()

    def _take(self) -> None:
        self.before_taking()
        self._shown_tokens = 0.0 if self._read_tokens is None else self._read_tokens()
        self._families = list(self._registry.collect())


class DispatchMetrics:
    """Metrics of one dispatcher, registered on `registry` or on one of their own.

    Attributes:
        windows: shows those that follow the gates' choices.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        windowed = CollectorRegistry()
        self.windows = WindowedCollector(windowed)
        registry.register(self.windows)
        self.calls = Counter(
            "faasmoe_router_function_calls_total", "Calls to functions.", registry=windowed
        )
        self.mailbox_calls = Counter(
            "faasmoe_router_mailbox_calls_total",
            "Calls to functions over mailboxes, without Python.",
            registry=windowed,
        )
        self.failed_calls = Counter(
            "faasmoe_router_function_call_failures_total",
            "Failed calls to functions.",
            registry=registry,
        )
        self.retries = Counter(
            "faasmoe_router_function_call_retries_total",
            "Retries of failed calls at another replica.",
            registry=registry,
        )
        self.hedges = Counter(
            "faasmoe_router_function_call_hedges_total",
            "Hedged calls at another replica.",
            registry=registry,
        )
        self.ejected = Gauge(
            "faasmoe_router_ejected_addresses",
            "Addresses ejected by outlier detection.",
            registry=registry,
        )
        self.local = Counter(
            "faasmoe_router_local_computations_total",
            "Calls computed by local fallback because no sandbox responded.",
            registry=registry,
        )
        self.colocated = Counter(
            "faasmoe_router_colocated_computations_total",
            "Calls computed in the router: to colocated functions, and to those without a place in "
            "limited memory.",
            registry=windowed,
        )
        self.queued = Gauge(
            "faasmoe_router_queued_calls",
            "Calls queued for the activation of their function.",
            registry=registry,
        )
        self.sent_bytes = Counter(
            "faasmoe_router_function_sent_bytes_total",
            "Bytes of request frames.",
            registry=windowed,
        )
        self.received_bytes = Counter(
            "faasmoe_router_function_received_bytes_total",
            "Bytes of response frames.",
            registry=windowed,
        )
        self.layer_seconds = Histogram(
            "faasmoe_router_layer_seconds",
            "Time of a MoE layer from dispatch to its combined output.",
            buckets=LATENCY_BUCKETS_S,
            registry=windowed,
        )
