"""The link to the control process: owns the table watcher, reporters and activator.

Starts their background jobs, restarts a job that fails, and stops all at shutdown.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

from faasmoe_contracts.routing_table import FunctionSpec, RoutingTable
from faasmoe_router.control.activator import (
    ACTIVATION_REPEAT_S,
    ActivationQueueLimits,
    ActivationRequester,
    Activator,
)
from faasmoe_router.control.awaited_activation import AwaitedActivation
from faasmoe_router.control.client import ControlClient
from faasmoe_router.control.load_reporter import LOAD_REPORT_INTERVAL_S, LoadReporter
from faasmoe_router.control.local_fallback import LocalFallback
from faasmoe_router.control.metrics import ControlLinkMetrics
from faasmoe_router.control.table_watcher import TableWatcher
from faasmoe_router.control.usage_reporter import UsageReporter, UsageSource
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.dispatch.routing import RoutingIndex
from faasmoe_tracing import NO_SPAN, Span

logger = logging.getLogger(__name__)

JOB_RESTART_DELAY_S = 1.0


class FunctionDispatcher(Protocol):
    """Caller of functions, such as the dispatcher."""

    @property
    def routing(self) -> RoutingIndex:
        """Addresses of each function."""

    @property
    def load(self) -> LoadMeter:
        """Load of each function."""

    def replace_table(self, table: RoutingTable) -> None:
        """Use another table; raises RoutingTableError and keeps the old one."""

    def update_addresses(self, version: int, addresses: Mapping[str, tuple[str, ...]]) -> None:
        """Use other addresses for some functions; raises RoutingTableError and changes nothing."""

    def check_local(self, specs: Sequence[FunctionSpec]) -> None:
        """Check that functions can be computed locally; raises RouterError. Thread-safe."""


class TenantsView(Protocol):
    """Tenants of this router, such as `TenantService`."""

    @property
    def n_routers(self) -> int:
        """Number of routers that serve the tenants."""

    @property
    def cluster_usage(self) -> UsageSource:
        """Usage of the tenants."""

    def n_keys(self) -> Mapping[str, int]:
        """Return the number of API keys of each tenant."""


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """Settings of the link.

    Attributes:
        router_name: name of this router, new at each start.
        queue_limits: capacity of the activation queue.
        queues_requests: whether requests wait for missing functions; not if the dispatcher computes
            those, because memory is limited.
        report_interval_s: time between two load reports, in seconds.
        activation_repeat_s: time between two requests for a function that is still awaited, in
            seconds.
    """

    router_name: str
    queue_limits: ActivationQueueLimits = field(default_factory=ActivationQueueLimits)
    queues_requests: bool = True
    report_interval_s: float = LOAD_REPORT_INTERVAL_S
    activation_repeat_s: float = ACTIVATION_REPEAT_S


class ControlLink:
    """Watches the routing table, reports load and usage, and queues requests for activation.

    An async context manager: its background jobs run within the context.

    Args:
        client: the control plane.
        activation_requester: sends activation requests; shared with the dispatcher.
        dispatcher: calls functions.
        settings: settings of the link.
        metrics: metrics of the link.

    Attributes:
        is_busy: returns whether the engine computes requests; set once the engine exists.
        tenants: the tenants; None without any.
    """

    def __init__(
        self,
        client: ControlClient,
        activation_requester: ActivationRequester,
        dispatcher: FunctionDispatcher,
        *,
        settings: LinkSettings,
        metrics: ControlLinkMetrics,
    ) -> None:
        self._client = client
        self._activation_requester = activation_requester
        self._dispatcher = dispatcher
        self._settings = settings
        self._local_fallback = LocalFallback(
            lambda: dispatcher.routing, check=dispatcher.check_local, metrics=metrics
        )
        queue_load = LoadMeter()
        self._activator = Activator(
            self,
            request_activation=activation_requester.request,
            limits=settings.queue_limits,
            metrics=metrics,
            load=queue_load,
            awaited_activation=AwaitedActivation(activation_requester.set_traceparent),
        )
        self._table_watcher = TableWatcher(
            client,
            dispatcher,
            metrics=metrics,
            on_table_changed=self._on_table_changed,
            on_new_epoch=activation_requester.reset_requested,
        )
        self._load_reporter = LoadReporter(
            client,
            router_name=settings.router_name,
            routing=lambda: dispatcher.routing,
            meters=(dispatcher.load, queue_load),
            interval_s=settings.report_interval_s,
            is_busy=lambda: self.is_busy(),
            tenant_keys=lambda: None if self.tenants is None else self.tenants.n_keys(),
        )
        self.is_busy: Callable[[], bool] = lambda: False
        self.tenants: TenantsView | None = None
        self._usage_reporter: UsageReporter | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> bool:
        """Whether a routing table was ever received."""
        return self._table_watcher.has_table

    @property
    def n_held(self) -> int:
        """Requests that wait for the activation of functions."""
        return self._activator.n_queued

    @property
    def activated_below_tokens(self) -> float:
        """Requests of fewer tokens than this need no missing function."""
        if self.ready and not self._settings.queues_requests:
            return math.inf
        return self._local_fallback.activated_below_tokens if self.ready else 0.0

    def missing_for(self, n_tokens: int) -> Sequence[str]:
        """Return the functions without address that a request of `n_tokens` tokens needs."""
        return self._local_fallback.missing_for(n_tokens)

    async def enable_local_fallback(self, n_tokens: int) -> bool:
        """Compute missing functions in the router; see `LocalFallback.enable_for`."""
        return self.ready and await self._local_fallback.enable_for(n_tokens)

    def is_activated_for(self, n_tokens: int) -> bool:
        """Return whether a request of `n_tokens` tokens need not be queued."""
        return self._activator.is_activated_for(n_tokens)

    async def wait_for_activation(
        self, n_tokens: int, *, size_bytes: int, span: Span = NO_SPAN
    ) -> float:
        """Queue a request; see `Activator.wait_for_activation`."""
        return await self._activator.wait_for_activation(n_tokens, size_bytes=size_bytes, span=span)

    def reject_queued(self) -> None:
        """Reject the queued requests, because the server shuts down."""
        self._activator.close()

    async def __aenter__(self) -> Self:
        jobs: dict[str, Callable[[], Awaitable[None]]] = {
            "table": self._table_watcher.run,
            "load": self._load_reporter.run,
            "activation": lambda: self._activation_requester.run(
                lambda: self._dispatcher.routing.missing
            ),
            "activation-repeat": self._repeat_activation_requests,
        }
        if (tenants := self.tenants) is not None:
            self._usage_reporter = UsageReporter(
                self._client, tenants.cluster_usage, n_routers=lambda: tenants.n_routers
            )
            jobs["usage"] = self._usage_reporter.run
        self._tasks = [
            asyncio.create_task(_restart_on_failure(name, job), name=f"control-{name}")
            for name, job in jobs.items()
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.reject_queued()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._usage_reporter is not None:
            await self._usage_reporter.report_final()
        await self._client.close()

    async def _repeat_activation_requests(self) -> None:
        while True:
            await asyncio.sleep(self._settings.activation_repeat_s)
            self._activator.repeat_request()

    def _on_table_changed(self) -> None:
        self._local_fallback.on_table_changed()
        self._activation_requester.retain_missing(set(self._dispatcher.routing.missing))
        self._activator.on_table_changed()


async def _restart_on_failure(name: str, job: Callable[[], Awaitable[None]]) -> None:
    """Run a job until cancelled, and restart it after an unexpected exception."""
    while True:
        try:
            await job()
        except Exception:
            logger.exception("Control link job %r failed; restarting it", name)
        await asyncio.sleep(JOB_RESTART_DELAY_S)
