"""A control core through jumps of its clock, partitions and restarts, over real HTTP."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from dataclasses import replace

import fake_platform as boxes_module
import pytest
from aiohttp import web
from fake_platform import (
    CLOCK_SPEED,
    DEADLINE_S,
    FAST_SCALING,
    TIMEOUTS,
    FakePlatform,
    controller_and_platform,
    error_response,
    eventually,
    make_model,
    reporting_load,
    routable_functions,
    running_controller,
)

from faasmoe_operator.control.api.requests import parse_activation_request, parse_load_report
from faasmoe_operator.control.controller import Controller, ControllerTiming
from faasmoe_operator.control.executor import (
    CORRUPTED_INITIAL_BACKOFF_S,
    CORRUPTED_MAX_BACKOFF_S,
    CorruptedFunctionBackoff,
)
from faasmoe_operator.control.load_reports import (
    PARTITION_GRACE_S,
    ROUTER_TIMEOUT_S,
    LoadReport,
    LoadReports,
    ReportedLoad,
)
from faasmoe_operator.control.sandbox_client import SandboxClientTimeouts
from faasmoe_operator.control.sandbox_prober import (
    ACTIVITY_WINDOW_S,
    MAX_CONSECUTIVE_TIMEOUTS,
    FunctionActivity,
)
from faasmoe_operator.plan.fleet import SandboxState
from faasmoe_operator.scaling import Phase

BUSY = LoadReport("r1", {"f0": ReportedLoad(1.0, calls=10)}, queued=0)
NO_GRACE = replace(FAST_SCALING, scale_to_zero_grace_period_s=0)


class FakeClock:
    """The controller's clock, which a test may make jump."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() * CLOCK_SPEED + self.ahead_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(boxes_module, "fast_clock", clock)
    return clock


async def advance_clock(controller: Controller, seconds: float) -> None:
    """Let seconds of the controller's clock pass."""
    end = controller.clock() + seconds
    while controller.clock() < end:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def n_attaches(fleet: FakePlatform) -> Counter[str]:
    calls = [call for box in fleet.servers.values() for call in box.calls]
    return Counter(call.removeprefix("PUT ") for call in calls if call.startswith("PUT "))


async def activate(controller: Controller, *functions: str) -> None:
    controller.activate(functions)
    await eventually(
        lambda: routable_functions(controller) >= set(functions), "the functions serve"
    )


def test_a_control_that_was_stopped_reaps_nothing_that_is_in_use(clock: FakeClock) -> None:
    async def story() -> None:
        async with controller_and_platform(make_model(2, scaling=NO_GRACE)) as (controller, fleet):
            await activate(controller, "f0")
            async with reporting_load(controller, BUSY):
                await advance_clock(controller, 8)
                before = n_attaches(fleet)
                changes = controller.routing_table.version
            # SIGSTOP for ten minutes, router still busy; it ticks before it hears anybody.
            controller.add_load_report(BUSY)
            clock.ahead_s += 600
            controller.tick()
            assert controller.autoscalers.desired("f0") == 1
            async with reporting_load(controller, BUSY):
                await advance_clock(controller, 10)
                assert routable_functions(controller) == {"f0"}
                assert n_attaches(fleet)["f0"] == before["f0"] == 1
                assert controller.routing_table.version == changes

    asyncio.run(story())


@pytest.mark.parametrize("late_s", [2.0, 4.0, 30.0])
def test_a_late_tick_costs_no_replica(clock: FakeClock, late_s: float) -> None:
    async def story() -> None:
        load = LoadReport("r1", {"f0": ReportedLoad(11.0, calls=10)})
        async with controller_and_platform(make_model(1, warm_pool=0)) as (controller, fleet):
            controller.activate(["f0"])
            async with reporting_load(controller, load):
                await eventually(lambda: len(fleet.sandboxes_with("f0")) == 4, "four replicas")
                await advance_clock(controller, FAST_SCALING.window_s)
                for _ in range(3):
                    clock.ahead_s += late_s
                    controller.tick()
                    assert controller.autoscalers.desired("f0") == 4
                    await advance_clock(controller, 2)

    asyncio.run(story())


def test_load_that_ends_before_a_late_tick_had_gone_on_until_it_ended() -> None:
    async def story() -> None:
        load = LoadReport("r1", {"f0": ReportedLoad(11.0, calls=10)})
        async with controller_and_platform(make_model(1, warm_pool=0)) as (controller, fleet):
            controller.activate(["f0"])
            async with reporting_load(controller, load):
                await eventually(lambda: len(fleet.sandboxes_with("f0")) == 4, "four replicas")
                await advance_clock(controller, FAST_SCALING.window_s)
                controller.add_load_report(load)
                now = controller.clock() + 4.0
                controller.clock = lambda: now
                controller.add_load_report(LoadReport("r1"))
                controller.tick()
                average = controller.autoscalers.concurrency("f0", now=now)
                assert average == pytest.approx(11.0 * 5 / 6, abs=1e-5)  # the last second had none

    asyncio.run(story())


def test_after_a_stop_what_is_idle_still_goes_to_zero(clock: FakeClock) -> None:
    async def story() -> None:
        async with controller_and_platform(make_model(1, scaling=NO_GRACE)) as (controller, _):
            await activate(controller, "f0")
            controller.add_load_report(BUSY)
            clock.ahead_s += 600
            controller.tick()
            controller.add_load_report(LoadReport("r1"))
            await eventually(lambda: not routable_functions(controller), "zero")

    asyncio.run(story())


def test_a_routers_clock_may_be_hours_off() -> None:
    for sent_at_s in (0.0, time.time() - 7200, time.time() + 7200):
        report = (
            f'{{"router": "r1", "sent_at_s": {sent_at_s}, "interval_s": 1.0, "held": 0, "local": 0,'
            '"functions": {"f0": {"concurrency": 1.5, "calls": 3, "rows": 12}}}'
        )
        assert parse_load_report(report.encode(), known={"f0"}).functions["f0"].calls == 3
        wake = f'{{"router": "r1", "sent_at_s": {sent_at_s}, "functions": ["f0"]}}'
        assert parse_activation_request(wake.encode(), known={"f0"}) == ["f0"]


def test_a_router_that_cannot_be_heard_keeps_what_it_uses_as_sandboxes_bear_witness() -> None:
    async def story() -> None:
        async with controller_and_platform(make_model(2, scaling=NO_GRACE)) as (controller, fleet):
            await activate(controller, "f0", "f1")
            both = LoadReport("r1", {f: ReportedLoad(1.0, calls=1) for f in ("f0", "f1")})
            controller.add_load_report(both)  # and then never again
            used = next(box for box in fleet.servers.values() if "f0" in box.functions)

            async def call() -> None:
                while True:
                    held = used.functions["f0"]
                    held["frames"] = held.get("frames", 0) + 5
                    await asyncio.sleep(0.01)

            calling = asyncio.create_task(call())
            await eventually(
                lambda: routable_functions(controller) == {"f0"}, "the unused one goes"
            )
            await advance_clock(controller, 3 * ROUTER_TIMEOUT_S)
            assert routable_functions(controller) == {"f0"}
            calling.cancel()
            await eventually(lambda: not routable_functions(controller), "zero, once nobody calls")

    asyncio.run(story())


def test_a_partition_from_a_sandbox_ends_in_one_replica_elsewhere() -> None:
    async def story() -> None:
        async with controller_and_platform(make_model(1)) as (controller, fleet):
            await activate(controller, "f0")
            (lost,) = fleet.sandboxes_with("f0")
            silent = asyncio.Event()

            async def hang(_: web.Request) -> web.Response:
                await silent.wait()
                return error_response(503, "draining")

            async with reporting_load(controller, BUSY):
                fleet.servers[lost].fault_handler = hang
                await eventually(lambda: lost not in fleet.servers, "it is given up")
                await eventually(
                    lambda: (
                        routable_functions(controller) == {"f0"}
                        and len(fleet.sandboxes_with("f0")) == 1
                    ),
                    "one replica elsewhere",
                )
                assert controller.fleet.ready_replicas()["f0"] == 1
            silent.set()

    asyncio.run(story())


def test_a_short_partition_from_a_sandbox_costs_nothing() -> None:
    async def story() -> None:
        async with controller_and_platform(make_model(1)) as (controller, fleet):
            await activate(controller, "f0")
            (holder,) = fleet.sandboxes_with("f0")
            n_silent = 0

            async def hang_once(request: web.Request) -> web.Response | None:
                nonlocal n_silent
                if request.method != "GET" or n_silent >= 1:
                    return None
                n_silent += 1
                await asyncio.sleep(1.0)  # longer than a list may take
                return None

            async with reporting_load(controller, BUSY):
                version = controller.routing_table.version
                fleet.servers[holder].fault_handler = hang_once
                await eventually(lambda: n_silent == 1, "silence")
                await advance_clock(controller, 20)
                assert fleet.sandboxes_with("f0") == [holder]
                assert controller.routing_table.version == version

    asyncio.run(story())


def test_many_wakes_during_restarts_activate_once() -> None:
    """A new control finds a function that the old one was just attaching."""

    async def story() -> None:
        fleet, model = FakePlatform(), make_model(1)
        slow = asyncio.Event()

        async def slow_attach(request: web.Request) -> web.Response | None:
            if request.method == "PUT":
                await request.read()
                await slow.wait()
            return None

        fleet.fault_handlers = [slow_attach]
        try:
            async with running_controller(model, fleet) as first:
                await eventually(lambda: first.fleet.n_generic() == 1, "a generic sandbox")
                for _ in range(20):
                    first.activate(["f0"])
                await eventually(lambda: n_attaches(fleet)["f0"] == 1, "the attach begins")
            slow.set()  # the control is gone, the attach goes on
            await eventually(lambda: len(fleet.sandboxes_with("f0")) == 1, "attached by nobody")
            async with running_controller(model, fleet) as second:
                for _ in range(20):
                    second.activate(["f0"])
                async with reporting_load(second, BUSY):
                    await eventually(lambda: routable_functions(second) == {"f0"}, "found")
                    await advance_clock(second, 10)
                    assert len(fleet.sandboxes_with("f0")) == 1
                    assert n_attaches(fleet)["f0"] == 1
        finally:
            await fleet.close()

    asyncio.run(story())


def test_a_sandbox_that_answers_late_is_read_back_before_anything_is_told() -> None:
    """Or routers would be told of a table that lacks what it holds, and wake it elsewhere."""

    async def story() -> None:
        fleet, model = FakePlatform(), make_model(1)
        n_unanswered = MAX_CONSECUTIVE_TIMEOUTS - 1

        async def late(request: web.Request) -> web.Response | None:
            nonlocal n_unanswered
            if request.method == "GET" and n_unanswered:
                n_unanswered -= 1
                await asyncio.sleep(2 * TIMEOUTS.list_timeout_s)
            return None

        try:
            async with running_controller(model, fleet) as first:
                await activate(first, "f0")
            [holder] = fleet.sandboxes_with("f0")
            fleet.servers[holder].fault_handler = late
            async with running_controller(model, fleet) as second:
                assert routable_functions(second) == {"f0"}
                assert n_unanswered == 0
        finally:
            await fleet.close()

    asyncio.run(story())
    assert (
        ControllerTiming().adopt_timeout_s
        >= MAX_CONSECUTIVE_TIMEOUTS * SandboxClientTimeouts().list_timeout_s
    )


def test_a_sandbox_without_an_address_keeps_no_control_from_starting() -> None:
    async def story() -> None:
        fleet, model = FakePlatform(), make_model(1, warm_pool=0)
        fleet.add_pending("pending", model.template)
        patient = replace(boxes_module.TIMING, adopt_timeout_s=2 * DEADLINE_S)
        async with running_controller(model, fleet, timing=patient) as controller:
            assert [m.state for m in controller.fleet.sandboxes] == [SandboxState.STARTING]

    asyncio.run(story())


def test_a_corrupted_block_is_tried_elsewhere_and_costs_no_sandbox_that_serves() -> None:
    async def story() -> None:
        async with controller_and_platform(make_model(2, capacity=2, warm_pool=0)) as (
            controller,
            fleet,
        ):
            await activate(controller, "f0")
            (holder,) = fleet.sandboxes_with("f0")
            is_damaged, tried = True, 0

            async def damaged(request: web.Request) -> web.Response | None:
                nonlocal tried
                if request.method == "PUT" and request.path.endswith("f1") and is_damaged:
                    tried += 1
                    return error_response(503, "corrupted")
                return None

            fleet.servers[holder].fault_handler = damaged
            async with reporting_load(controller, BUSY):
                controller.activate(["f1"])
                await eventually(lambda: tried >= 3, "tried again and again")
                assert fleet.sandboxes_with("f0") == [holder]
                assert "corrupted" in controller.failure
                is_damaged = False
                await eventually(lambda: routable_functions(controller) == {"f0", "f1"}, "healed")
                assert fleet.sandboxes_with("f0") == [holder]
                assert controller.autoscalers.phase("f1") is not Phase.INACTIVE

    asyncio.run(story())


def test_retries_of_a_corrupted_block_come_less_and_less_often() -> None:
    spoiled, now, times = CorruptedFunctionBackoff(), 0.0, []
    while now < 1000:
        if not spoiled.is_backing_off("f0", now):
            times.append(now)
            spoiled.record_failure("f0", now)
        now += 0.5
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert gaps[0] == CORRUPTED_INITIAL_BACKOFF_S
    assert gaps[-1] == CORRUPTED_MAX_BACKOFF_S
    assert gaps == sorted(gaps)
    assert not spoiled.is_backing_off("f1", 0.0)
    spoiled.record_success("f0")
    assert not spoiled.is_backing_off("f0", now)


def test_a_count_that_grows_is_use_and_one_that_stays_is_not() -> None:
    usage = FunctionActivity()
    usage.record_frame_counts("s1", [("f0", 7), ("f1", 7)], now=0.0)
    assert usage.recently_active(0.0) == set()  # it may be from before
    usage.record_frame_counts("s1", [("f0", 8), ("f1", 7)], now=5.0)
    assert usage.recently_active(5.0) == {"f0"}
    assert usage.recently_active(5.0 + ACTIVITY_WINDOW_S + 1) == set()
    usage.retain_sandboxes([])
    usage.record_frame_counts("s1", [("f0", 99)], now=30.0)
    assert usage.recently_active(30.0) == set()


def test_only_a_router_that_fell_silent_under_load_is_missed() -> None:
    reports = LoadReports(now=0.0)
    reports.add(BUSY, now=0.0)
    reports.add(LoadReport("idle"), now=0.0)
    assert not reports.has_lost_router_with_load(ROUTER_TIMEOUT_S)
    assert reports.has_lost_router_with_load(ROUTER_TIMEOUT_S + 1)
    assert not reports.has_lost_router_with_load(ROUTER_TIMEOUT_S + 1 + PARTITION_GRACE_S)
    reports.add(BUSY, now=5000.0)
    assert not reports.has_lost_router_with_load(5000.0)


def test_a_time_that_is_bridged_ages_no_report() -> None:
    reports = LoadReports(now=0.0)
    reports.add(BUSY, now=100.0)
    reports.skip_suspension(101.0, 701.0)
    assert reports.concurrency(701.0) == {"f0": 1.0}
    assert reports.concurrency(701.0 + ROUTER_TIMEOUT_S) == {}
