"""The launcher asks which routers may run, as often as there is something to ask."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from faasmoe_contracts.router_demand import RouterReport
from faasmoe_operator.aio import ChangeNotifier
from faasmoe_operator.cli import router_memory
from faasmoe_operator.cli.router_memory import limit_routers
from faasmoe_operator.plan.router_size import RouterSize

TIMEOUT_S = 120.0


class FakeRouters:
    """Routers of a model, of which a test says what they report.

    Attributes:
        report: what they report.
        allowed: what they were allowed last; None before that.
    """

    def __init__(self, **state: bool) -> None:
        self.slots: tuple[Any, ...] = ()
        self.allowed: frozenset[str] | None = None
        self._changed = ChangeNotifier()
        self.set(**state)

    def set(self, **state: bool) -> None:
        flags = ("is_running", "is_wanted", "is_pinned", "is_ready")
        self.report = RouterReport(
            "a/0", 1, 0.0, **{**dict.fromkeys(flags, False), **state}, waiting_s=0.0
        )
        self._changed.notify()

    @property
    def state(self) -> Any:
        return self.report

    def reports(self, machine: Any) -> list[RouterReport]:
        return [self.report]

    def allow(self, may_run: frozenset[str]) -> None:
        self.allowed = may_run

    async def wait_for_change(self, state: Any) -> None:
        await self._changed.wait_for(lambda: self.report != state)


class Control:
    """A control process that answers as a test says.

    Attributes:
        may_run: its answer; None for an error.
        n_requests: requests so far.
    """

    def __init__(self) -> None:
        self.may_run: list[str] | None = []
        self.n_requests = 0

    @asynccontextmanager
    async def limiting(self, routers: Any) -> AsyncIterator[None]:
        app = web.Application()
        app.router.add_post("/routers", self._answer)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        task = asyncio.create_task(limit_routers([routers], f"http://{host}:{port}", "secret"))
        try:
            async with asyncio.timeout(TIMEOUT_S):
                yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer secret"
        self.n_requests += 1
        if self.may_run is None:
            return web.Response(status=503)
        return web.json_response({"may_run": self.may_run})


async def until(condition: Any) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_memory, "WAITING_INTERVAL_S", 0.01)
    monkeypatch.setattr(router_memory, "INTERVAL_S", 3600.0)


def test_router_that_waits_is_asked_for_until_it_may_run() -> None:
    async def work() -> None:
        routers, control = FakeRouters(is_wanted=True), Control()
        async with control.limiting(routers):
            await until(lambda: control.n_requests > 3)
            assert routers.allowed == frozenset()
            control.may_run = ["a/0"]
            await until(lambda: routers.allowed == {"a/0"})

    asyncio.run(work())


def test_nothing_is_asked_at_zero_until_something_changes() -> None:
    async def work() -> None:
        routers, control = FakeRouters(), Control()
        control.may_run = ["a/0"]
        async with control.limiting(routers):
            await until(lambda: routers.allowed is not None)
            n_requests = control.n_requests
            assert n_requests == 1
            routers.set(is_wanted=True)
            await until(lambda: control.n_requests > n_requests)

    asyncio.run(work())


def test_answer_that_does_not_come_changes_nothing() -> None:
    async def work() -> None:
        routers, control = FakeRouters(is_wanted=True), Control()
        control.may_run = None
        async with control.limiting(routers):
            await until(lambda: control.n_requests > 2)
            assert routers.allowed is None

    asyncio.run(work())


class MeasuredSlot:
    """A router that says before which request it was measured."""

    def __init__(self, control: Control, *, is_ready: bool = True) -> None:
        self.size, self.child, self.is_ready = RouterSize(), None, is_ready
        self.is_measured, self.measured_s = False, -math.inf
        self.measured_before: list[int] = []
        self._control = control

    async def measure(self, *, n_sharing: int) -> None:
        assert n_sharing == 1
        self.is_measured, self.measured_s = True, time.monotonic()
        self.measured_before.append(self._control.n_requests)


def test_one_router_is_measured_before_each_request() -> None:
    async def work() -> None:
        routers, control = FakeRouters(is_wanted=True), Control()
        slots = [MeasuredSlot(control) for _ in range(3)]
        starting = MeasuredSlot(control, is_ready=False)
        routers.slots = (starting, *slots)
        async with control.limiting(routers):
            await until(lambda: control.n_requests > 8)
        assert [slot.measured_before for slot in slots] == [[0], [1], [2]]
        assert not starting.measured_before

    asyncio.run(work())
