"""Metrics of the gateway, which it serves on a port of its own, without a key.

Every combination of labels that alerts use exists at 0 from the moment that its model or tenant is
known, as a counter that appears with its first event shows no increase. Those of tenants and models
that are gone are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from faasmoe_gateway.refusal import BUDGET_EXCEEDED, RATE_LIMIT_EXCEEDED, Refusal

ANSWERED, REFUSED, FAILED, CANCELLED = "answered", "refused", "failed", "cancelled"
NO_ROUTER, ROUTER_ERROR, SHUTDOWN = "no_router", "router_error", "shutdown"
GATEWAY_ERROR = "gateway_error"
BUDGET = "budget"
LIMITS = ("requests", "tokens", "input_tokens", "output_tokens", BUDGET)
KNOWN_ENDS = (
    (ANSWERED, ""),
    (REFUSED, RATE_LIMIT_EXCEEDED),
    (REFUSED, BUDGET_EXCEEDED),
    (FAILED, NO_ROUTER),
    (FAILED, ROUTER_ERROR),
    (FAILED, GATEWAY_ERROR),
    (CANCELLED, ""),
)
"""Ends of requests, with their reasons, that exist at 0."""
OVERHEAD_BUCKETS_S = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.1, 0.5)
WAIT_BUCKETS_S = (0.005, 0.05, 0.25, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


@dataclass(slots=True)
class RequestRecord:
    """What becomes of one request.

    Attributes:
        started_s: when its head was there; times are monotonic seconds.
        tenant: whose it is; empty if nobody's.
        model: name of its MoEModel; empty until that is known.
        outcome: how it ended.
        reason: why it was refused or failed; empty otherwise.
        limit: the limit by which it was refused; empty otherwise.
        body_s: time in which its body came.
        overhead_s: time that the gateway took before it was sent; None if it was not.
        waited_s: time that it waited for its turn and for a router.
    """

    started_s: float
    tenant: str = ""
    model: str = ""
    outcome: str = ANSWERED
    reason: str = ""
    limit: str = ""
    body_s: float = 0.0
    overhead_s: float | None = None
    waited_s: float = 0.0

    def end(self, outcome: str, reason: str = "") -> None:
        """Note how it ended."""
        self.outcome, self.reason = outcome, reason

    def refuse(self, refusal: Refusal) -> None:
        """Note that it was refused."""
        self.end(REFUSED, refusal.code)
        self.limit = BUDGET if refusal.code == BUDGET_EXCEEDED else refusal.limit

    def read_status(self, status: int) -> None:
        """Note the status of a router's answer."""
        if status >= 500:
            self.end(FAILED, ROUTER_ERROR)
        elif status >= 400:
            self.end(REFUSED, f"status_{status}")


class GatewayMetrics:
    """The metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "faasmoe_gateway_requests_total",
            "Requests by model (empty: none that exists), by how they ended and why.",
            ("model", "outcome", "reason"),
            registry=self.registry,
        )
        self._tenant_requests = Counter(
            "faasmoe_gateway_tenant_requests_total",
            "Requests by tenant (empty: no valid key), by how they ended and why.",
            ("tenant", "outcome", "reason"),
            registry=self.registry,
        )
        self._refusals = Counter(
            "faasmoe_gateway_limit_refusals_total",
            "Requests that a limit per minute or a budget has refused.",
            ("tenant", "limit"),
            registry=self.registry,
        )
        self._overhead = Histogram(
            "faasmoe_gateway_overhead_seconds",
            "Time from a request's head to its being handed on, without its body's arrival.",
            buckets=OVERHEAD_BUCKETS_S,
            registry=self.registry,
        )
        self._wait = Histogram(
            "faasmoe_gateway_wait_seconds",
            "Time that requests waited for their turn and for a router.",
            ("model",),
            buckets=WAIT_BUCKETS_S,
            registry=self.registry,
        )
        self._models: set[str] = set()
        self._tenants: set[str] = set()
        self._seen_ends: set[tuple[str, str]] = set(KNOWN_ENDS)
        self.configure((), ())
        self._create(self._requests, "")
        self._create(self._tenant_requests, "")

    def configure(self, models: Collection[str], tenants: Collection[str]) -> None:
        """Take the models and tenants that there are."""
        for name in self._models.difference(models):
            self._drop(self._requests, name)
            self._wait.remove(name)
        for name in self._tenants.difference(tenants):
            self._drop(self._tenant_requests, name)
            for limit in LIMITS:
                self._refusals.remove(name, limit)
        for name in set(models) - self._models:
            self._create(self._requests, name)
            self._wait.labels(name)
        for name in set(tenants) - self._tenants:
            self._create(self._tenant_requests, name)
            for limit in LIMITS:
                self._refusals.labels(name, limit)
        self._models, self._tenants = set(models), set(tenants)

    def count(self, record: RequestRecord) -> None:
        """Count a request that has ended; a model or tenant that is gone meanwhile is none."""
        model = record.model if record.model in self._models else ""
        tenant = record.tenant if record.tenant in self._tenants else ""
        self._seen_ends.add((record.outcome, record.reason))
        self._requests.labels(model, record.outcome, record.reason).inc()
        self._tenant_requests.labels(tenant, record.outcome, record.reason).inc()
        if record.limit and tenant:
            self._refusals.labels(tenant, record.limit).inc()
        if record.overhead_s is not None:
            self._overhead.observe(record.overhead_s)
            if model:
                self._wait.labels(model).observe(record.waited_s)

    def _create(self, counter: Counter, name: str) -> None:
        for outcome, reason in KNOWN_ENDS:
            counter.labels(name, outcome, reason)

    def _drop(self, counter: Counter, name: str) -> None:
        for outcome, reason in self._seen_ends:
            counter.remove(name, outcome, reason)


class GatewayState(Collector):
    """Gauges of what the gateway is doing, read when they are asked for.

    Args:
        waiting: returns the requests that wait for a router, by model.
        held_bytes: returns the bytes that requests hold.
        connected: returns whether each connection to the control plane is there, by its purpose.
        lease_age_s: returns the time since leases were renewed; None without leases.
    """

    def __init__(
        self,
        *,
        waiting: Callable[[], Iterable[tuple[str, int]]],
        held_bytes: Callable[[], int],
        connected: Callable[[], Iterable[tuple[str, bool]]],
        lease_age_s: Callable[[], float | None],
    ) -> None:
        self._waiting = waiting
        self._held_bytes = held_bytes
        self._connected = connected
        self._lease_age_s = lease_age_s

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges."""
        waiting = GaugeMetricFamily(
            "faasmoe_gateway_waiting_requests",
            "Requests that wait for a router.",
            labels=("model",),
        )
        for model, n_waiting in self._waiting():
            waiting.add_metric((model,), n_waiting)
        yield waiting
        yield GaugeMetricFamily(
            "faasmoe_gateway_held_bytes",
            "Bytes of requests and of their streams that are kept to be repeated.",
            value=self._held_bytes(),
        )
        connected = GaugeMetricFamily(
            "faasmoe_gateway_control_connected",
            "1 while the connection to the control plane is there, by its purpose.",
            labels=("purpose",),
        )
        for purpose, is_connected in self._connected():
            connected.add_metric((purpose,), float(is_connected))
        yield connected
        if (age_s := self._lease_age_s()) is not None:
            yield GaugeMetricFamily(
                "faasmoe_gateway_lease_age_seconds",
                "Time since the leases of limits were renewed; +Inf if they never were.",
                value=age_s,
            )
