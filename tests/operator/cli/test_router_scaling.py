"""A router that ends while nobody uses its model, and starts with the next request."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Never

import pytest

from faasmoe_contracts.router_demand import RouterDemand
from faasmoe_operator.api.v1alpha1.router import RouterScalingSpec
from faasmoe_operator.cli import router_scaling
from faasmoe_operator.cli.router_scaling import (
    RouterScaler,
    ScaledRouter,
    demand_listener,
    scaled_router,
)
from faasmoe_operator.cli.supervisor import SupervisedChild
from faasmoe_operator.errors import CommandError

IDLE = RouterScalingSpec.model_validate({"idleSeconds": 30})


def tick(scaler: RouterScaler, seconds: range, *, n_requests: int = 0) -> list[bool]:
    wanted = []
    for second in seconds:
        scaler.set_demand(n_requests, second + 0.5)
        scaler.tick(second + 0.5, is_running=scaler.is_wanted)
        wanted.append(scaler.is_wanted)
    return wanted


def test_router_ends_after_its_idle_time_and_not_before() -> None:
    wanted = tick(RouterScaler(IDLE, 0.0), range(100))
    assert 29 <= wanted.index(False) <= 32
    assert not any(wanted[32:])


def test_router_stays_while_a_request_runs() -> None:
    assert all(tick(RouterScaler(IDLE, 0.0), range(500), n_requests=1))


def test_request_starts_the_router_at_once_and_restarts_its_idle_time() -> None:
    scaler = RouterScaler(IDLE, 0.0)
    tick(scaler, range(100))
    scaler.set_demand(1, 100.2)
    assert scaler.is_wanted
    assert all(tick(scaler, range(101, 121), n_requests=1))
    wanted = tick(scaler, range(121, 221))
    assert 25 <= wanted.index(False) <= 35


def test_router_with_a_minimum_never_ends() -> None:
    spec = RouterScalingSpec.model_validate({"idleSeconds": 30, "minReplicas": 1})
    assert all(tick(RouterScaler(spec, 0.0), range(200)))


@pytest.fixture
def socket() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rs-") as folder:  # tmp_path may be too long
        yield Path(folder) / "demand.sock"


class FakeRouters:
    """Routers that only count.

    Attributes:
        n_started: starts so far.
        n_running: routers that run.
        changed: set whenever that changes.
        failure: raises what the last one fails with.
    """

    def __init__(self) -> None:
        self.n_started = 0
        self.n_running = 0
        self.changed = asyncio.Event()
        self.failure: asyncio.Future[Never]

    @asynccontextmanager
    async def start(self) -> AsyncIterator[tuple[SupervisedChild, asyncio.Task[Never]]]:
        self.failure = asyncio.get_running_loop().create_future()

        async def fail() -> Never:
            await self.failure
            raise AssertionError("it ended without a failure")

        task = asyncio.create_task(fail())
        child = SupervisedChild("router")
        child.pid = 42
        self.n_started += 1
        self.n_running += 1
        self.changed.set()
        try:
            yield child, task
        finally:
            self.n_running -= 1
            self.changed.set()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def until_running(routers: FakeRouters, n_running: int) -> None:
    async with asyncio.timeout(30):
        while routers.n_running != n_running:
            routers.changed.clear()
            await routers.changed.wait()


def test_demand_over_the_socket_starts_the_router_again(
    socket: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_scaling, "TICK_S", 0.01)
    clock = iter(range(10**9))
    monkeypatch.setattr("faasmoe_operator.cli.router_scaling.time.time", lambda: next(clock) + 0.5)

    async def work() -> None:
        routers = FakeRouters()
        async with scaled_router(IDLE, routers.start, "it") as (scaled, failure):
            await until_running(routers, 1)
            scaled.has_started = True
            await until_running(routers, 0)
            async with demand_listener(socket, {"a": scaled}):
                _, writer = await asyncio.open_unix_connection(str(socket))
                writer.write(RouterDemand(a=1, b=3).dumps())
                await until_running(routers, 1)
                assert routers.n_started == 2
                writer.close()  # the gateway has died, and its requests with it
                await until_running(routers, 0)
            assert not failure.done()

    asyncio.run(work())


def test_router_does_not_end_before_it_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_scaling, "TICK_S", 0.0)
    seconds = 0

    def clock() -> float:
        nonlocal seconds
        seconds += 1
        return seconds + 0.5

    monkeypatch.setattr("faasmoe_operator.cli.router_scaling.time.time", clock)

    async def work() -> None:
        routers = FakeRouters()
        async with scaled_router(IDLE, routers.start, "it") as (scaled, _):
            await until_running(routers, 1)
            for _ in range(1000):
                await asyncio.sleep(0)
            assert (seconds, routers.n_running) == (1, 1)
            scaled.has_started = True
            await until_running(routers, 0)

    asyncio.run(work())


def test_router_that_cannot_be_started_is_a_failure() -> None:
    async def work() -> None:
        routers = FakeRouters()
        async with scaled_router(IDLE, routers.start, "it") as (scaled, failure):
            assert isinstance(scaled, ScaledRouter)
            await until_running(routers, 1)
            routers.failure.set_exception(CommandError("the router ended"))
            with pytest.raises(CommandError, match="the router ended"):
                await failure

    asyncio.run(work())


def test_other_lines_end_the_connection(socket: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        routers = FakeRouters()
        async with (
            scaled_router(IDLE, routers.start, "it") as (scaled, _),
            demand_listener(socket, {"a": scaled}),
        ):
            reader, writer = await asyncio.open_unix_connection(str(socket))
            writer.write(b'{"a": -1}\n')
            async with asyncio.timeout(30):
                assert await reader.read() == b""
            writer.close()

    asyncio.run(work())
    assert "a: got -1, expected an integer" in caplog.text
