"""The link to one control process: everything that runs beside the engine, started and ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

from faasmoe_expert.table import FunctionSpec, FunctionTable
from faasmoe_router.control.client import ControlClient
from faasmoe_router.control.follower import TableFollower
from faasmoe_router.control.gate import ColdStartGate, HoldLimits
from faasmoe_router.control.metrics import ControlMetrics
from faasmoe_router.control.reporter import REPORT_INTERVAL_S, LoadReporter
from faasmoe_router.control.standins import StandIns
from faasmoe_router.control.teller import KeepsBooks, UsageTeller
from faasmoe_router.control.waker import Waker
from faasmoe_router.control.wakes import REPEAT_S
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.dispatch.routing import Routing

logger = logging.getLogger(__name__)

RESTART_S = 1.0


class Dispatch(Protocol):
    """What calls functions; the dispatcher."""

    @property
    def routing(self) -> Routing:
        """Where each function is now."""

    @property
    def load(self) -> LoadMeter:
        """How much each function is called."""

    def replace_table(self, table: FunctionTable) -> None:
        """Take another table; raises TableError and keeps the old one."""

    def move_functions(self, version: int, addresses: Mapping[str, tuple[str, ...]]) -> None:
        """Take other addresses for some functions; raises TableError and changes nothing."""

    def check_local(self, specs: Sequence[FunctionSpec]) -> None:
        """Check that functions can be computed here; raises RouterError; from any thread."""


class Tenants(Protocol):
    """The tenants of this router; `Tenancy` is such."""

    @property
    def n_routers(self) -> int:
        """Routers that serve them."""

    @property
    def books(self) -> KeepsBooks:
        """What they have used."""

    def n_keys(self) -> Mapping[str, int]:
        """Return how many keys each tenant has."""


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """How a router behaves towards its control plane.

    Attributes:
        router: this router's name, another one at each start.
        limits: how much may wait for cold starts.
        report_interval_s: time between two load reports.
        repeat_s: time between two wakes of a function that is still waited for.
    """

    router: str
    limits: HoldLimits = field(default_factory=HoldLimits)
    report_interval_s: float = REPORT_INTERVAL_S
    repeat_s: float = REPEAT_S


class ControlLink:
    """Follows the table, reports load, sends wakes, and holds requests; an async context manager.

    Args:
        client: the control plane.
        waker: sends wakes; the dispatcher has it too.
        dispatch: what calls functions.
        settings: how to behave.
        metrics: counters.

    Attributes:
        is_busy: tells whether the engine computes requests; set once there is an engine.
        tenants: the tenants; set if there are any.
    """

    def __init__(
        self,
        client: ControlClient,
        waker: Waker,
        dispatch: Dispatch,
        *,
        settings: LinkSettings,
        metrics: ControlMetrics,
    ) -> None:
        self._client = client
        self._waker = waker
        self._dispatch = dispatch
        self._settings = settings
        self._stand_ins = StandIns(
            lambda: dispatch.routing, check=dispatch.check_local, metrics=metrics
        )
        gate_load = LoadMeter()
        self._gate = ColdStartGate(
            self, wake=waker.want, limits=settings.limits, metrics=metrics, load=gate_load
        )
        self._follower = TableFollower(
            client,
            dispatch,
            metrics=metrics,
            on_table=self._table_changed,
            on_epoch=waker.forget_asked,
        )
        self._reporter = LoadReporter(
            client,
            router=settings.router,
            routing=lambda: dispatch.routing,
            meters=(dispatch.load, gate_load),
            interval_s=settings.report_interval_s,
            is_busy=lambda: self.is_busy(),
            tenants=lambda: None if self.tenants is None else self.tenants.n_keys(),
        )
        self.is_busy: Callable[[], bool] = lambda: False
        self.tenants: Tenants | None = None
        self._teller: UsageTeller | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def ready(self) -> bool:
        """Whether a function table was ever told."""
        return self._follower.has_table

    @property
    def complete_below(self) -> float:
        """Requests of fewer tokens than this lack no function."""
        return self._stand_ins.complete_below if self.ready else 0.0

    def missing_for(self, n_tokens: int) -> Sequence[str]:
        """Return the functions that so many tokens need and that have no address."""
        return self._stand_ins.missing_for(n_tokens)

    async def stand_in_for(self, n_tokens: int) -> bool:
        """Compute what so many tokens lack in the router; see `StandIns.take`."""
        return self.ready and await self._stand_ins.take(n_tokens)

    def is_open_for(self, n_tokens: int) -> bool:
        """Return whether a request of so many tokens need not be held."""
        return self._gate.is_open_for(n_tokens)

    async def hold(self, n_tokens: int, *, size_bytes: int) -> float:
        """Hold a request; see `ColdStartGate.hold`."""
        return await self._gate.hold(n_tokens, size_bytes=size_bytes)

    def end_held(self) -> None:
        """Refuse the requests that are held, as when the server is about to end."""
        self._gate.close()

    async def __aenter__(self) -> Self:
        jobs: dict[str, Callable[[], Awaitable[None]]] = {
            "table": self._follower.run,
            "reports": self._reporter.run,
            "wakes": lambda: self._waker.run(lambda: self._dispatch.routing.missing),
            "repeat": self._repeat,
        }
        if (tenants := self.tenants) is not None:
            self._teller = UsageTeller(
                self._client, tenants.books, n_routers=lambda: tenants.n_routers
            )
            jobs["usage"] = self._teller.run
        self._tasks = [
            asyncio.create_task(_keep_running(name, job), name=f"control-{name}")
            for name, job in jobs.items()
        ]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.end_held()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._teller is not None:
            await self._teller.end()
        await self._client.close()

    async def _repeat(self) -> None:
        while True:
            await asyncio.sleep(self._settings.repeat_s)
            self._gate.wake_again()

    def _table_changed(self) -> None:
        self._stand_ins.table_changed()
        self._waker.keep(set(self._dispatch.routing.missing))
        self._gate.table_changed()


async def _keep_running(name: str, job: Callable[[], Awaitable[None]]) -> None:
    """Run a job for ever: a fault of ours in one must end neither it nor the router."""
    while True:
        try:
            await job()
        except Exception:
            logger.exception("The link's job %r failed; it is begun again", name)
        await asyncio.sleep(RESTART_S)
