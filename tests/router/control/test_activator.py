import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from faasmoe_router.control.activator import ActivationQueueLimits, Activator
from faasmoe_router.control.metrics import ControlLinkMetrics
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.errors import ActivationQueueFull, ActivationTimeout, EngineUnavailable


class FakeFunctions:
    """Two functions: `a` is needed from one token on, `b` from ten on."""

    def __init__(self) -> None:
        self.missing = {"a": 1, "b": 10}
        self.can_fall_back = False
        self.n_fallback_requests = 0
        self.go = asyncio.Event()

    @property
    def activated_below_tokens(self) -> float:
        return min(self.missing.values(), default=float("inf"))

    def missing_for(self, n_tokens: int) -> Sequence[str]:
        return [name for name, needs in self.missing.items() if needs <= n_tokens]

    async def enable_local_fallback(self, n_tokens: int) -> bool:
        self.n_fallback_requests += 1
        if self.can_fall_back:
            await self.go.wait()
            for name in self.missing_for(n_tokens):
                del self.missing[name]
        return self.can_fall_back


class ActivatorHarness:
    """A gate, what it sees, and a clock that the test moves."""

    def __init__(self, **limits: Any) -> None:
        self.functions = FakeFunctions()
        self.requests: list[list[str]] = []
        self.load = LoadMeter()
        self.now_s = 0.0
        self.registry = CollectorRegistry()
        self.activator = Activator(
            self.functions,
            request_activation=lambda names: self.requests.append(list(names)),
            limits=ActivationQueueLimits(**limits),
            metrics=ControlLinkMetrics(self.registry),
            load=self.load,
            clock=lambda: self.now_s,
        )

    def add_address(self, name: str) -> None:
        del self.functions.missing[name]
        self.activator.on_table_changed()

    def send(self, n_tokens: int, size_bytes: int = 1) -> "asyncio.Task[float]":
        return asyncio.create_task(
            self.activator.wait_for_activation(n_tokens, size_bytes=size_bytes)
        )

    def metric(self, name: str) -> float:
        return self.registry.get_sample_value(f"faasmoe_router_{name}") or 0.0


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def run_scenario(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(10):
            await scenario()

    asyncio.run(bounded())


def test_a_request_goes_once_all_its_functions_have_addresses() -> None:
    async def scenario() -> None:
        world = ActivatorHarness()
        assert not world.activator.is_activated_for(1)
        queued = [world.send(10) for _ in range(32)]
        await settle()
        assert world.requests == [["a", "b"]]
        assert world.metric("queued_requests") == world.load.queued == 32
        world.now_s = 1.5
        world.add_address("a")
        await settle()
        assert not any(h.done() for h in queued)
        world.now_s = 2.5
        world.add_address("b")
        assert await asyncio.gather(*queued) == [2.5] * 32
        assert world.activator.is_activated_for(10)
        assert world.metric("queued_requests") == world.load.queued == 0
        assert world.metric("cold_start_seconds_count") == 32

    run_scenario(scenario)


def test_a_request_waits_only_for_what_it_needs() -> None:
    async def scenario() -> None:
        world = ActivatorHarness()
        small, large = world.send(2), world.send(12)
        await settle()
        assert world.requests == [["a"], ["a", "b"]]
        world.add_address("a")
        await small
        assert not large.done()
        world.add_address("b")
        await large

    run_scenario(scenario)


def test_what_is_waited_for_is_asked_for_again_until_nobody_waits() -> None:
    async def scenario() -> None:
        world = ActivatorHarness()
        queued = world.send(1)
        await settle()
        world.activator.repeat_request()
        assert world.requests == [["a"], ["a"]]
        world.add_address("a")
        await queued
        world.activator.repeat_request()
        assert world.requests == [["a"], ["a"]]

    run_scenario(scenario)


def test_a_request_is_refused_when_its_time_is_over() -> None:
    async def scenario() -> None:
        world = ActivatorHarness(timeout_s=0.01)
        with pytest.raises(ActivationTimeout, match=r"within 0\.01 s"):
            await world.activator.wait_for_activation(1, size_bytes=1)
        assert world.metric("queued_requests") == 0
        assert world.metric("cold_start_seconds_count") == 0
        world.activator.repeat_request()
        assert len(world.requests) == 1

    run_scenario(scenario)


def test_a_request_whose_time_is_over_goes_if_the_router_stands_in_and_so_do_the_others() -> None:
    async def scenario() -> None:
        world = ActivatorHarness(timeout_s=0.5)
        world.functions.can_fall_back = True
        first = world.send(1)
        while not world.functions.n_fallback_requests:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        second = world.send(1)
        await settle()
        world.functions.go.set()
        await asyncio.gather(first, second)
        assert world.functions.n_fallback_requests == 1
        assert world.metric("queued_requests") == 0
        assert world.metric("cold_start_seconds_count") == 2

    run_scenario(scenario)


@pytest.mark.parametrize(
    "limits", [{"max_requests": 2}, {"max_bytes": 25}], ids=["requests", "bytes"]
)
def test_a_full_queue_refuses_and_keeps_those_that_wait(limits: dict[str, int]) -> None:
    async def scenario() -> None:
        world = ActivatorHarness(**limits)
        queued = [world.send(1, 10) for _ in range(2)]
        await settle()
        with pytest.raises(ActivationQueueFull, match="queued for activation"):
            await world.activator.wait_for_activation(1, size_bytes=10)
        world.add_address("a")
        await asyncio.gather(*queued)
        world.functions.missing["a"] = 1
        again = world.send(1, 10)
        await settle()
        assert not again.done()
        world.add_address("a")
        await again

    run_scenario(scenario)


def test_a_client_that_hangs_up_leaves_its_place() -> None:
    async def scenario() -> None:
        world = ActivatorHarness(max_requests=1)
        queued = world.send(1)
        await settle()
        queued.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await queued
        assert world.metric("queued_requests") == 0
        other = world.send(1)
        await settle()
        assert not other.done()
        world.add_address("a")
        await other

    run_scenario(scenario)


def test_closing_answers_all_who_wait_and_all_who_come() -> None:
    async def scenario() -> None:
        world = ActivatorHarness()
        queued = [world.send(1) for _ in range(3)]
        await settle()
        world.activator.close()
        results = await asyncio.gather(*queued, return_exceptions=True)
        assert [type(r) for r in results] == [EngineUnavailable] * 3
        with pytest.raises(EngineUnavailable):
            await world.activator.wait_for_activation(1, size_bytes=1)

    run_scenario(scenario)


def test_a_function_that_is_waited_for_is_one_call_in_flight_however_many_wait() -> None:
    async def scenario() -> None:
        world = ActivatorHarness()
        queued = [world.send(1) for _ in range(8)]
        await settle()
        world.now_s = 3.0
        assert world.load.snapshot(3.0)["a"].in_flight_s == 3.0
        world.add_address("a")
        await asyncio.gather(*queued)
        assert world.load.snapshot(9.0)["a"] == (3.0, 0, 0)

    run_scenario(scenario)


def test_a_function_taken_away_again_while_others_are_awaited_is_asked_for() -> None:
    async def scenario() -> None:
        world = ActivatorHarness()
        queued = world.send(10)
        await settle()
        world.add_address("a")
        world.functions.missing["a"] = 1
        world.activator.on_table_changed()
        assert sorted(world.requests[-1]) == ["a", "b"]
        world.add_address("b")
        await settle()
        assert not queued.done()
        world.add_address("a")
        await queued

    run_scenario(scenario)
