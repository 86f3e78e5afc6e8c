import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from faasmoe_router.control.gate import ColdStartGate, HoldLimits
from faasmoe_router.control.metrics import ControlMetrics
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.errors import ActivationTimeout, EngineUnavailable, HoldQueueFull


class Functions:
    """Two functions: `a` is needed from one token on, `b` from ten on."""

    def __init__(self) -> None:
        self.missing = {"a": 1, "b": 10}
        self.can_stand_in = False
        self.n_asked = 0
        self.go = asyncio.Event()

    @property
    def complete_below(self) -> float:
        return min(self.missing.values(), default=float("inf"))

    def missing_for(self, n_tokens: int) -> Sequence[str]:
        return [name for name, needs in self.missing.items() if needs <= n_tokens]

    async def stand_in_for(self, n_tokens: int) -> bool:
        self.n_asked += 1
        if self.can_stand_in:
            await self.go.wait()
            for name in self.missing_for(n_tokens):
                del self.missing[name]
        return self.can_stand_in


class World:
    """A gate, what it sees, and a clock that the test moves."""

    def __init__(self, **limits: Any) -> None:
        self.functions = Functions()
        self.wakes: list[list[str]] = []
        self.load = LoadMeter()
        self.now_s = 0.0
        self.registry = CollectorRegistry()
        self.gate = ColdStartGate(
            self.functions,
            wake=lambda names: self.wakes.append(list(names)),
            limits=HoldLimits(**limits),
            metrics=ControlMetrics(self.registry),
            load=self.load,
            clock=lambda: self.now_s,
        )

    def place(self, name: str) -> None:
        del self.functions.missing[name]
        self.gate.table_changed()

    def hold(self, n_tokens: int, size_bytes: int = 1) -> "asyncio.Task[float]":
        return asyncio.create_task(self.gate.hold(n_tokens, size_bytes=size_bytes))

    def metric(self, name: str) -> float:
        return self.registry.get_sample_value(f"faasmoe_router_{name}") or 0.0


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def story(tell: Callable[[], Awaitable[None]]) -> None:
    async def told() -> None:
        async with asyncio.timeout(10):
            await tell()

    asyncio.run(told())


def test_a_request_goes_once_all_its_functions_have_addresses() -> None:
    async def tell() -> None:
        world = World()
        assert not world.gate.is_open_for(1)
        held = [world.hold(10) for _ in range(32)]
        await settle()
        assert world.wakes == [["a", "b"]]
        assert world.metric("held_requests") == world.load.held == 32
        world.now_s = 1.5
        world.place("a")
        await settle()
        assert not any(h.done() for h in held)
        world.now_s = 2.5
        world.place("b")
        assert await asyncio.gather(*held) == [2.5] * 32
        assert world.gate.is_open_for(10)
        assert world.metric("held_requests") == world.load.held == 0
        assert world.metric("cold_start_seconds_count") == 32

    story(tell)


def test_a_request_waits_only_for_what_it_needs() -> None:
    async def tell() -> None:
        world = World()
        small, large = world.hold(2), world.hold(12)
        await settle()
        assert world.wakes == [["a"], ["a", "b"]]
        world.place("a")
        await small
        assert not large.done()
        world.place("b")
        await large

    story(tell)


def test_what_is_waited_for_is_asked_for_again_until_nobody_waits() -> None:
    async def tell() -> None:
        world = World()
        held = world.hold(1)
        await settle()
        world.gate.wake_again()
        assert world.wakes == [["a"], ["a"]]
        world.place("a")
        await held
        world.gate.wake_again()
        assert world.wakes == [["a"], ["a"]]

    story(tell)


def test_a_request_is_refused_when_its_time_is_over() -> None:
    async def tell() -> None:
        world = World(timeout_s=0.01)
        with pytest.raises(ActivationTimeout, match=r"within 0\.01 s"):
            await world.gate.hold(1, size_bytes=1)
        assert world.metric("held_requests") == 0
        assert world.metric("cold_start_seconds_count") == 0
        world.gate.wake_again()
        assert len(world.wakes) == 1

    story(tell)


def test_a_request_whose_time_is_over_goes_if_the_router_stands_in_and_so_do_the_others() -> None:
    async def tell() -> None:
        world = World(timeout_s=0.5)
        world.functions.can_stand_in = True
        first = world.hold(1)
        while not world.functions.n_asked:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        second = world.hold(1)
        await settle()
        world.functions.go.set()
        await asyncio.gather(first, second)
        assert world.functions.n_asked == 1
        assert world.metric("held_requests") == 0
        assert world.metric("cold_start_seconds_count") == 2

    story(tell)


@pytest.mark.parametrize(
    "limits", [{"max_requests": 2}, {"max_bytes": 25}], ids=["requests", "bytes"]
)
def test_a_full_queue_refuses_and_keeps_those_that_wait(limits: dict[str, int]) -> None:
    async def tell() -> None:
        world = World(**limits)
        held = [world.hold(1, 10) for _ in range(2)]
        await settle()
        with pytest.raises(HoldQueueFull, match="wait for the model's functions"):
            await world.gate.hold(1, size_bytes=10)
        world.place("a")
        await asyncio.gather(*held)
        world.functions.missing["a"] = 1
        again = world.hold(1, 10)
        await settle()
        assert not again.done()
        world.place("a")
        await again

    story(tell)


def test_a_client_that_hangs_up_leaves_its_place() -> None:
    async def tell() -> None:
        world = World(max_requests=1)
        held = world.hold(1)
        await settle()
        held.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await held
        assert world.metric("held_requests") == 0
        other = world.hold(1)
        await settle()
        assert not other.done()
        world.place("a")
        await other

    story(tell)


def test_closing_answers_all_who_wait_and_all_who_come() -> None:
    async def tell() -> None:
        world = World()
        held = [world.hold(1) for _ in range(3)]
        await settle()
        world.gate.close()
        results = await asyncio.gather(*held, return_exceptions=True)
        assert [type(r) for r in results] == [EngineUnavailable] * 3
        with pytest.raises(EngineUnavailable):
            await world.gate.hold(1, size_bytes=1)

    story(tell)


def test_a_function_that_is_waited_for_is_one_call_in_flight_however_many_wait() -> None:
    async def tell() -> None:
        world = World()
        held = [world.hold(1) for _ in range(8)]
        await settle()
        world.now_s = 3.0
        assert world.load.read(3.0)["a"].in_flight_s == 3.0
        world.place("a")
        await asyncio.gather(*held)
        assert world.load.read(9.0)["a"] == (3.0, 0, 0)

    story(tell)


def test_a_function_taken_away_again_while_others_are_awaited_is_asked_for() -> None:
    async def tell() -> None:
        world = World()
        held = world.hold(10)
        await settle()
        world.place("a")
        world.functions.missing["a"] = 1
        world.gate.table_changed()
        assert sorted(world.wakes[-1]) == ["a", "b"]
        world.place("b")
        await settle()
        assert not held.done()
        world.place("a")
        await held

    story(tell)
