"""Routers that start and end by what gateways report."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Never, NoReturn

import pytest

from faasmoe_contracts.router_demand import RouterDemand, RunningRouters
from faasmoe_operator.api.v1alpha1.router import RouterScalingSpec
from faasmoe_operator.cli import router_scaling
from faasmoe_operator.cli.router_scaling import (
    MachineRouters,
    RouterSlot,
    ScaledRouters,
    scaled_routers,
)
from faasmoe_operator.cli.shared_stack import write_router_count
from faasmoe_operator.cli.supervisor import SupervisedChild
from faasmoe_operator.control.gateway_links import GatewayLinks
from faasmoe_operator.control.router_scaler import RouterScaler
from faasmoe_operator.errors import CommandError
from faasmoe_operator.plan.router_size import RouterSize

TIMEOUT_S = 120.0


def spec_of(**fields: Any) -> RouterScalingSpec:
    return RouterScalingSpec.model_validate({"idleSeconds": 30, **fields})


IDLE = spec_of()


def tick(scaler: RouterScaler, seconds: range, *, n_requests: int = 0) -> list[int]:
    desired = []
    for second in seconds:
        scaler.set_demand(n_requests, second + 0.5)
        scaler.tick(second + 0.5, n_ready=scaler.desired)
        desired.append(scaler.desired)
    return desired


def test_router_ends_after_its_idle_time_and_not_before() -> None:
    desired = tick(RouterScaler(IDLE, 4, 0.0), range(100))
    assert 29 <= desired.index(0) <= 32
    assert not any(desired[32:])


def test_router_stays_while_a_request_runs() -> None:
    assert all(tick(RouterScaler(IDLE, 4, 0.0), range(500), n_requests=1))


def test_request_starts_the_router_at_once_and_restarts_its_idle_time() -> None:
    scaler = RouterScaler(IDLE, 4, 0.0)
    tick(scaler, range(100))
    scaler.set_demand(1, 100.2)
    assert scaler.desired == 1
    assert all(tick(scaler, range(101, 121), n_requests=1))
    desired = tick(scaler, range(121, 221))
    assert 25 <= desired.index(0) <= 35


@pytest.mark.parametrize("spec", [spec_of(minReplicas=1), None])
def test_router_with_a_minimum_never_ends(spec: RouterScalingSpec | None) -> None:
    scaler = RouterScaler(spec, 4, 0.0)
    assert set(tick(scaler, range(200))) == {1}
    scaler.end(201.0)
    assert scaler.desired == 1


def test_as_many_routers_run_as_requests_need() -> None:
    scaler = RouterScaler(spec_of(maxReplicas=3, targetConcurrency=4), 32, 0.0)
    assert tick(scaler, range(60), n_requests=4)[-1] == 1
    assert tick(scaler, range(60, 120), n_requests=8)[-1] == 2
    assert tick(scaler, range(120, 180), n_requests=100)[-1] == 3
    assert tick(scaler, range(180, 300), n_requests=1)[-1] == 1
    assert tick(scaler, range(300, 400))[-1] == 0


def test_target_is_a_batch_if_it_is_not_given() -> None:
    scaler = RouterScaler(spec_of(maxReplicas=8), 16, 0.0)
    assert tick(scaler, range(60), n_requests=33)[-1] == 3


def test_more_routers_at_least_than_at_most_are_refused() -> None:
    with pytest.raises(ValueError, match="minReplicas"):
        spec_of(minReplicas=2, maxReplicas=1)


@pytest.fixture
def socket() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rs-") as folder:  # tmp_path may be too long
        yield Path(folder) / "demand.sock"


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a second pass at each tick, without waiting."""
    monkeypatch.setattr(router_scaling, "TICK_S", 0.01)
    monkeypatch.setattr(router_scaling, "PID_INTERVAL_S", 0.01)
    clock = iter(range(10**9))
    monkeypatch.setattr("faasmoe_operator.cli.router_scaling.time.time", lambda: next(clock) + 0.5)


class FakeRouters:
    """Routers that only count.

    Attributes:
        running: indices of those that run.
        n_started: starts so far.
        n_wakes: starts for a request so far, as functions are told of.
        counts: how many took requests, whenever that changed.
        healthy: lets them answer.
        failure: raises what they fail with.
    """

    def __init__(self) -> None:
        self.running: set[int] = set()
        self.n_started = 0
        self.n_wakes = 0
        self.counts: list[int] = []
        self.healthy = asyncio.Event()
        self.healthy.set()
        self.failure: asyncio.Future[Never] = asyncio.get_running_loop().create_future()

    @asynccontextmanager
    async def start(self, index: int) -> AsyncIterator[tuple[SupervisedChild, asyncio.Task[Never]]]:
        async def fail() -> Never:
            await asyncio.shield(self.failure)
            raise AssertionError("it ended without a failure")

        task = asyncio.create_task(fail())
        child = SupervisedChild("router")
        child.pid = 42
        self.n_started += 1
        self.running.add(index)
        try:
            yield child, task
        finally:
            self.running.discard(index)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def routers(
        self, spec: RouterScalingSpec, links: GatewayLinks, *, may_run: bool = True
    ) -> ScaledRouters:
        async def wait_until_healthy() -> None:
            await self.healthy.wait()

        def slot(index: int) -> RouterSlot:
            return RouterSlot(index, lambda: self.start(index), wait_until_healthy, may_run=may_run)

        async def count_wake() -> None:
            self.n_wakes += 1

        slots = [slot(index) for index in range(spec.max_replicas)]
        scaler = RouterScaler(spec, 4, 0.5)
        return ScaledRouters(
            "a", scaler, slots, links, on_wake=count_wake, on_running=self.counts.append
        )


class FakeGateway:
    """A gateway's end of the connection.

    Attributes:
        running: what it was told last.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.running = RunningRouters(0, {})
        self._reader = reader
        self._writer = writer
        self._demand = RouterDemand()
        self._is_following = asyncio.create_task(self._follow())

    @classmethod
    async def connect(cls, socket: Path) -> FakeGateway:
        return cls(*await asyncio.open_unix_connection(str(socket)))

    def report(self, n_requests: int, **routers: int) -> None:
        names = {name.removeprefix("r"): count for name, count in routers.items()}
        self._demand = RouterDemand({"a": n_requests}, {"a": names}, self.running.version)
        self._writer.write(self._demand.dumps())

    async def close(self) -> None:
        self._is_following.cancel()
        await asyncio.gather(self._is_following, return_exceptions=True)
        self._writer.close()

    async def _follow(self) -> None:
        while line := await self._reader.readline():
            self.running = RunningRouters.loads(line)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():  # noqa: ASYNC110  # of state that has no event
            await asyncio.sleep(0.005)


@pytest.mark.usefixtures("seconds")
def test_demand_over_the_socket_starts_the_router_again(socket: Path) -> None:
    async def work() -> None:
        fake, links = FakeRouters(), GatewayLinks()
        async with (
            links.listening(socket),
            scaled_routers(fake.routers(IDLE, links)) as (_, failure),
        ):
            await until(lambda: fake.running == {0})
            await until(lambda: not fake.running)  # no gateway has a request
            gateway = await FakeGateway.connect(socket)
            gateway.report(1)
            await until(lambda: fake.running == {0})
            assert (fake.n_started, fake.n_wakes) == (2, 1)
            await gateway.close()  # the gateway has died, and its requests with it
            await until(lambda: not fake.running)
            assert not failure.done()

    asyncio.run(work())


@pytest.mark.usefixtures("seconds")
def test_router_ends_once_gateways_know_and_have_no_request_of_it(socket: Path) -> None:
    spec = spec_of(maxReplicas=2, minReplicas=1, targetConcurrency=1)

    async def work() -> None:
        fake, links = FakeRouters(), GatewayLinks()
        async with links.listening(socket), scaled_routers(fake.routers(spec, links)):
            gateway = await FakeGateway.connect(socket)
            gateway.report(2, r0=1, r1=1)
            await until(lambda: gateway.running.routers.get("a") == ("0", "1"))
            gateway.report(1, r1=1)
            await until(lambda: gateway.running.routers["a"] == ("0",))
            gateway.report(1, r1=1)  # it knows, and its request still runs there
            for _ in range(50):
                await asyncio.sleep(0)
            assert fake.running == {0, 1}
            gateway.report(0)
            await until(lambda: fake.running == {0})
            assert fake.counts == [1, 2, 1]
            await gateway.close()

    asyncio.run(work())


@pytest.mark.usefixtures("seconds")
def test_router_is_told_of_only_while_it_answers(socket: Path) -> None:
    async def work() -> None:
        fake, links = FakeRouters(), GatewayLinks()
        fake.healthy.clear()
        async with (
            links.listening(socket),
            scaled_routers(fake.routers(spec_of(minReplicas=1), links)) as (scaled, _),
        ):
            gateway = await FakeGateway.connect(socket)
            await until(lambda: "a" in gateway.running.routers)
            assert gateway.running.routers["a"] == ()
            assert not scaled.has_started.is_set()
            fake.healthy.set()
            await until(lambda: gateway.running.routers["a"] == ("0",))
            assert scaled.has_started.is_set()
            child = scaled.slots[0].child
            assert child is not None
            fake.healthy.clear()
            child.pid = None  # it has died and is being restarted
            await until(lambda: gateway.running.routers["a"] == ())
            await gateway.close()

    asyncio.run(work())


@pytest.mark.usefixtures("seconds")
def test_router_runs_only_as_the_memory_limit_lets_it() -> None:
    async def work() -> None:
        fake, links = FakeRouters(), GatewayLinks()
        routers = fake.routers(spec_of(idleSeconds=3600), links, may_run=False)
        async with scaled_routers(routers) as (scaled, _):
            (report,) = scaled.reports(MachineRouters(()))
            assert (report.name, report.is_running, report.is_wanted) == ("a/0", False, True)
            scaled.allow(frozenset({"a/0"}))
            await until(lambda: scaled.slots[0].is_ready)
            scaled.allow(frozenset())  # others need the memory: it ends, and is not wanted
            await until(lambda: not fake.running)
            assert not scaled.reports(MachineRouters(()))[0].is_wanted

    asyncio.run(work())


def test_router_does_not_end_before_it_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_scaling, "TICK_S", 0.0)
    ticks = 0

    def clock() -> float:
        nonlocal ticks
        ticks += 1
        return ticks + 0.5

    monkeypatch.setattr("faasmoe_operator.cli.router_scaling.time.time", clock)

    async def work() -> None:
        fake, links = FakeRouters(), GatewayLinks()
        fake.healthy.clear()
        async with scaled_routers(fake.routers(IDLE, links)):
            await until(lambda: fake.running == {0})
            for _ in range(1000):
                await asyncio.sleep(0)
            assert (ticks, fake.running) == (0, {0})
            fake.healthy.set()
            await until(lambda: not fake.running)

    asyncio.run(work())


def test_router_that_cannot_be_started_is_a_failure() -> None:
    async def work() -> None:
        fake, links = FakeRouters(), GatewayLinks()
        async with scaled_routers(fake.routers(IDLE, links)) as (_, failure):
            await until(lambda: fake.running == {0})
            fake.failure.set_exception(CommandError("the router ended"))
            with pytest.raises(CommandError, match="the router ended"):
                await failure
            assert not fake.running

    asyncio.run(work())


def test_other_lines_end_the_connection(socket: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        links = GatewayLinks()
        async with links.listening(socket):
            reader, writer = await asyncio.open_unix_connection(str(socket))
            writer.write(b'{"models": {"a": -1}, "routers": {}, "seen": 0}\n')
            async with asyncio.timeout(TIMEOUT_S):
                await reader.read()
            writer.close()

    asyncio.run(work())
    assert "models.a: got -1, expected an integer" in caplog.text


def test_routers_are_told_over_how_many_of_them_concurrency_is_split(tmp_path: Path) -> None:
    file = tmp_path / "tenants.json"
    file.write_text('{"version": 1, "tenants": []}')
    write_router_count(file, 2)
    write_router_count(file, 0)  # who starts next is told when it runs
    write_router_count(None, 3)
    assert json.loads(file.read_text()) == {"version": 1, "tenants": [], "routerReplicas": 2}


def slot_of(size: RouterSize, *, pid: int | None = None) -> RouterSlot:
    async def nobody() -> None:
        raise AssertionError("nobody asks for its health")

    def start() -> NoReturn:
        raise AssertionError("it runs already")

    slot = RouterSlot(0, start, nobody, size=size)
    if pid is not None:
        slot.child = SupervisedChild("router")
        slot.child.pid, slot.is_ready = pid, True
    return slot


def test_a_router_is_measured_once_it_answers() -> None:
    slot = slot_of(RouterSize(1, "a"))
    slot.child = SupervisedChild("router")
    asyncio.run(slot.measure(n_sharing=1))
    assert not slot.is_measured  # there is no process
    slot.child.pid = os.getpid()
    asyncio.run(slot.measure(n_sharing=1))
    assert not slot.is_measured  # it does not answer yet
    slot.is_ready = True
    asyncio.run(slot.measure(n_sharing=1))
    assert slot.is_measured
    assert slot.size.bytes_among(1) > 1 << 20


def test_routers_of_the_same_weights_count_them_once_together() -> None:
    sizes = [RouterSize(3_000_000, content) for content in ("a", "a", "b")]
    running = [slot_of(size.measured(7, 1 << 30, n_sharing=1), pid=1) for size in sizes]
    stopped = slot_of(RouterSize(3_000_000, "a"))
    machine = MachineRouters([*running, stopped])
    assert [machine.bytes_of(slot) for slot in running] == [1_500_007, 1_500_007, 3_000_007]
    assert machine.bytes_of(stopped) == 1_000_007  # its part, beside what one like it has
    assert machine.n_sharing(stopped) == 3
