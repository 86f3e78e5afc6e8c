"""A control core through jumps of its clock, partitions and restarts, over real HTTP."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from dataclasses import replace

import boxes as boxes_module
import pytest
from aiohttp import web
from boxes import (
    DEADLINE_S,
    QUICK,
    SPEED,
    TIMEOUTS,
    Boxes,
    controlling,
    eventually,
    model_of,
    refused,
    reporting,
    serving,
    world,
)

from faasmoe_operator.control.api.bodies import read_load, read_wake
from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.inspector import MAX_SILENCES
from faasmoe_operator.control.reports import (
    CUT_OFF_S,
    ROUTER_LOST_S,
    FunctionLoad,
    LoadReport,
    Reports,
)
from faasmoe_operator.control.sandbox_client import Timeouts
from faasmoe_operator.control.spoiled import FIRST_S, MOST_S, Spoiled
from faasmoe_operator.control.timing import Timing
from faasmoe_operator.control.usage import KEPT_S, Usage
from faasmoe_operator.plan.fleet import SandboxState
from faasmoe_operator.scaling import Phase

BUSY = LoadReport("r1", {"f0": FunctionLoad(1.0, calls=10)}, held=0)
NO_GRACE = replace(QUICK, scale_to_zero_grace_period_s=0)


class Clock:
    """The controller's clock, which a test may make jump."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() * SPEED + self.ahead_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(boxes_module, "fast_clock", clock)
    return clock


async def pass_time(controller: Controller, seconds: float) -> None:
    """Let seconds of the controller's clock pass."""
    end = controller.clock() + seconds
    while controller.clock() < end:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def n_attaches(fleet: Boxes) -> Counter[str]:
    calls = [call for box in fleet.boxes.values() for call in box.calls]
    return Counter(call.removeprefix("PUT ") for call in calls if call.startswith("PUT "))


async def bring_up(controller: Controller, *functions: str) -> None:
    controller.wake(functions)
    await eventually(lambda: serving(controller) >= set(functions), "the functions serve")


def test_a_control_that_was_stopped_reaps_nothing_that_is_in_use(clock: Clock) -> None:
    async def story() -> None:
        async with world(model_of(2, scaling=NO_GRACE)) as (controller, fleet):
            await bring_up(controller, "f0")
            async with reporting(controller, BUSY):
                await pass_time(controller, 8)
                before = n_attaches(fleet)
                changes = controller.feed.version
            # SIGSTOP for ten minutes, router still busy; it ticks before it hears anybody.
            controller.take(BUSY)
            clock.ahead_s += 600
            controller.tick()
            assert controller.scalers.desired("f0") == 1
            async with reporting(controller, BUSY):
                await pass_time(controller, 10)
                assert serving(controller) == {"f0"}
                assert n_attaches(fleet)["f0"] == before["f0"] == 1
                assert controller.feed.version == changes

    asyncio.run(story())


@pytest.mark.parametrize("late_s", [2.0, 4.0, 30.0])
def test_a_late_tick_costs_no_replica(clock: Clock, late_s: float) -> None:
    async def story() -> None:
        load = LoadReport("r1", {"f0": FunctionLoad(11.0, calls=10)})
        async with world(model_of(1, warm_pool=0)) as (controller, fleet):
            controller.wake(["f0"])
            async with reporting(controller, load):
                await eventually(lambda: len(fleet.holders("f0")) == 4, "four replicas")
                await pass_time(controller, QUICK.window_s)
                for _ in range(3):
                    clock.ahead_s += late_s
                    controller.tick()
                    assert controller.scalers.desired("f0") == 4
                    await pass_time(controller, 2)

    asyncio.run(story())


def test_load_that_ends_before_a_late_tick_had_gone_on_until_it_ended() -> None:
    async def story() -> None:
        load = LoadReport("r1", {"f0": FunctionLoad(11.0, calls=10)})
        async with world(model_of(1, warm_pool=0)) as (controller, fleet):
            controller.wake(["f0"])
            async with reporting(controller, load):
                await eventually(lambda: len(fleet.holders("f0")) == 4, "four replicas")
                await pass_time(controller, QUICK.window_s)
                controller.take(load)
                now = controller.clock() + 4.0
                controller.clock = lambda: now
                controller.take(LoadReport("r1"))
                controller.tick()
                average = controller.scalers.concurrency("f0", now=now)
                assert average == pytest.approx(11.0 * 5 / 6, abs=1e-5)  # the last second had none

    asyncio.run(story())


def test_after_a_stop_what_is_idle_still_goes_to_zero(clock: Clock) -> None:
    async def story() -> None:
        async with world(model_of(1, scaling=NO_GRACE)) as (controller, _):
            await bring_up(controller, "f0")
            controller.take(BUSY)
            clock.ahead_s += 600
            controller.tick()
            controller.take(LoadReport("r1"))
            await eventually(lambda: not serving(controller), "zero")

    asyncio.run(story())


def test_a_routers_clock_may_be_hours_off() -> None:
    for sent_at_s in (0.0, time.time() - 7200, time.time() + 7200):
        report = (
            f'{{"router": "r1", "sent_at_s": {sent_at_s}, "interval_s": 1.0, "held": 0, "local": 0,'
            '"functions": {"f0": {"concurrency": 1.5, "calls": 3, "rows": 12}}}'
        )
        assert read_load(report.encode(), known={"f0"}).functions["f0"].calls == 3
        wake = f'{{"router": "r1", "sent_at_s": {sent_at_s}, "functions": ["f0"]}}'
        assert read_wake(wake.encode(), known={"f0"}) == ["f0"]


def test_a_router_that_cannot_be_heard_keeps_what_it_uses_as_sandboxes_bear_witness() -> None:
    async def story() -> None:
        async with world(model_of(2, scaling=NO_GRACE)) as (controller, fleet):
            await bring_up(controller, "f0", "f1")
            both = LoadReport("r1", {f: FunctionLoad(1.0, calls=1) for f in ("f0", "f1")})
            controller.take(both)  # and then never again
            used = next(box for box in fleet.boxes.values() if "f0" in box.functions)

            async def call() -> None:
                while True:
                    held = used.functions["f0"]
                    held["frames"] = held.get("frames", 0) + 5
                    await asyncio.sleep(0.01)

            calling = asyncio.create_task(call())
            await eventually(lambda: serving(controller) == {"f0"}, "the unused one goes")
            await pass_time(controller, 3 * ROUTER_LOST_S)
            assert serving(controller) == {"f0"}
            calling.cancel()
            await eventually(lambda: not serving(controller), "zero, once nobody calls")

    asyncio.run(story())


def test_a_partition_from_a_sandbox_ends_in_one_replica_elsewhere() -> None:
    async def story() -> None:
        async with world(model_of(1)) as (controller, fleet):
            await bring_up(controller, "f0")
            (lost,) = fleet.holders("f0")
            silent = asyncio.Event()

            async def hang(_: web.Request) -> web.Response:
                await silent.wait()
                return refused(503, "draining")

            async with reporting(controller, BUSY):
                fleet.boxes[lost].fault = hang
                await eventually(lambda: lost not in fleet.boxes, "it is given up")
                await eventually(
                    lambda: serving(controller) == {"f0"} and len(fleet.holders("f0")) == 1,
                    "one replica elsewhere",
                )
                assert controller.fleet.ready()["f0"] == 1
            silent.set()

    asyncio.run(story())


def test_a_short_partition_from_a_sandbox_costs_nothing() -> None:
    async def story() -> None:
        async with world(model_of(1)) as (controller, fleet):
            await bring_up(controller, "f0")
            (holder,) = fleet.holders("f0")
            n_silent = 0

            async def hang_once(request: web.Request) -> web.Response | None:
                nonlocal n_silent
                if request.method != "GET" or n_silent >= 1:
                    return None
                n_silent += 1
                await asyncio.sleep(1.0)  # longer than a list may take
                return None

            async with reporting(controller, BUSY):
                version = controller.feed.version
                fleet.boxes[holder].fault = hang_once
                await eventually(lambda: n_silent == 1, "silence")
                await pass_time(controller, 20)
                assert fleet.holders("f0") == [holder]
                assert controller.feed.version == version

    asyncio.run(story())


def test_many_wakes_during_restarts_activate_once() -> None:
    """A new control finds a function that the old one was just attaching."""

    async def story() -> None:
        fleet, model = Boxes(), model_of(1)
        slow = asyncio.Event()

        async def slow_attach(request: web.Request) -> web.Response | None:
            if request.method == "PUT":
                await request.read()
                await slow.wait()
            return None

        fleet.faults = [slow_attach]
        try:
            async with controlling(model, fleet) as first:
                await eventually(lambda: first.fleet.n_generic() == 1, "a generic sandbox")
                for _ in range(20):
                    first.wake(["f0"])
                await eventually(lambda: n_attaches(fleet)["f0"] == 1, "the attach begins")
            slow.set()  # the control is gone, the attach goes on
            await eventually(lambda: len(fleet.holders("f0")) == 1, "attached by nobody")
            async with controlling(model, fleet) as second:
                for _ in range(20):
                    second.wake(["f0"])
                async with reporting(second, BUSY):
                    await eventually(lambda: serving(second) == {"f0"}, "found")
                    await pass_time(second, 10)
                    assert len(fleet.holders("f0")) == 1
                    assert n_attaches(fleet)["f0"] == 1
        finally:
            await fleet.end()

    asyncio.run(story())


def test_a_sandbox_that_answers_late_is_read_back_before_anything_is_told() -> None:
    """Or routers would be told of a table that lacks what it holds, and wake it elsewhere."""

    async def story() -> None:
        fleet, model = Boxes(), model_of(1)
        n_unanswered = MAX_SILENCES - 1

        async def late(request: web.Request) -> web.Response | None:
            nonlocal n_unanswered
            if request.method == "GET" and n_unanswered:
                n_unanswered -= 1
                await asyncio.sleep(2 * TIMEOUTS.list_timeout_s)
            return None

        try:
            async with controlling(model, fleet) as first:
                await bring_up(first, "f0")
            [holder] = fleet.holders("f0")
            fleet.boxes[holder].fault = late
            async with controlling(model, fleet) as second:
                assert serving(second) == {"f0"}
                assert n_unanswered == 0
        finally:
            await fleet.end()

    asyncio.run(story())
    assert Timing().adopt_timeout_s >= MAX_SILENCES * Timeouts().list_timeout_s


def test_a_sandbox_without_an_address_keeps_no_control_from_starting() -> None:
    async def story() -> None:
        fleet, model = Boxes(), model_of(1, warm_pool=0)
        fleet.expect("pending", model.template)
        patient = replace(boxes_module.TIMING, adopt_timeout_s=2 * DEADLINE_S)
        async with controlling(model, fleet, timing=patient) as controller:
            assert [m.state for m in controller.fleet.members] == [SandboxState.STARTING]

    asyncio.run(story())


def test_a_corrupted_block_is_tried_elsewhere_and_costs_no_sandbox_that_serves() -> None:
    async def story() -> None:
        async with world(model_of(2, capacity=2, warm_pool=0)) as (controller, fleet):
            await bring_up(controller, "f0")
            (holder,) = fleet.holders("f0")
            is_damaged, tried = True, 0

            async def damaged(request: web.Request) -> web.Response | None:
                nonlocal tried
                if request.method == "PUT" and request.path.endswith("f1") and is_damaged:
                    tried += 1
                    return refused(503, "corrupted")
                return None

            fleet.boxes[holder].fault = damaged
            async with reporting(controller, BUSY):
                controller.wake(["f1"])
                await eventually(lambda: tried >= 3, "tried again and again")
                assert fleet.holders("f0") == [holder]
                assert "corrupted" in controller.trouble
                is_damaged = False
                await eventually(lambda: serving(controller) == {"f0", "f1"}, "healed")
                assert fleet.holders("f0") == [holder]
                assert controller.scalers.phase("f1") is not Phase.INACTIVE

    asyncio.run(story())


def test_retries_of_a_corrupted_block_come_less_and_less_often() -> None:
    spoiled, now, times = Spoiled(), 0.0, []
    while now < 1000:
        if not spoiled.is_waiting("f0", now):
            times.append(now)
            spoiled.refused("f0", now)
        now += 0.5
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert gaps[0] == FIRST_S
    assert gaps[-1] == MOST_S
    assert gaps == sorted(gaps)
    assert not spoiled.is_waiting("f1", 0.0)
    spoiled.attached("f0")
    assert not spoiled.is_waiting("f0", now)


def test_a_count_that_grows_is_use_and_one_that_stays_is_not() -> None:
    usage = Usage()
    usage.note("s1", [("f0", 7), ("f1", 7)], now=0.0)
    assert usage.lately(0.0) == set()  # it may be from before
    usage.note("s1", [("f0", 8), ("f1", 7)], now=5.0)
    assert usage.lately(5.0) == {"f0"}
    assert usage.lately(5.0 + KEPT_S + 1) == set()
    usage.keep([])
    usage.note("s1", [("f0", 99)], now=30.0)
    assert usage.lately(30.0) == set()


def test_only_a_router_that_fell_silent_under_load_is_missed() -> None:
    reports = Reports(now=0.0)
    reports.take(BUSY, now=0.0)
    reports.take(LoadReport("idle"), now=0.0)
    assert not reports.has_lost_one(ROUTER_LOST_S)
    assert reports.has_lost_one(ROUTER_LOST_S + 1)
    assert not reports.has_lost_one(ROUTER_LOST_S + 1 + CUT_OFF_S)
    reports.take(BUSY, now=5000.0)
    assert not reports.has_lost_one(5000.0)


def test_a_time_that_is_bridged_ages_no_report() -> None:
    reports = Reports(now=0.0)
    reports.take(BUSY, now=100.0)
    reports.bridge(101.0, 701.0)
    assert reports.sample(701.0) == {"f0": 1.0}
    assert reports.sample(701.0 + ROUTER_LOST_S) == {}
