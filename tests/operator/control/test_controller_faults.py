"""The controller through clock jumps, partitions, restarts and faulty sandboxes, over real HTTP."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import replace

import fake_platform
import pytest
from aiohttp import web
from fake_platform import (
    CLOCK_SPEED,
    DEADLINE_S,
    FAST_SCALING,
    TIMEOUTS,
    TIMING,
    FakePlatform,
    controller_and_platform,
    error_response,
    eventually,
    make_model,
    reporting_load,
    routable_functions,
    running_controller,
)

from faasmoe_contracts.control_messages import FunctionLoad, LoadReport
from faasmoe_operator.control.api.requests import parse_activation_request, parse_load_report
from faasmoe_operator.control.controller import Controller, ControllerTiming
from faasmoe_operator.control.load_reports import (
    PARTITION_GRACE_S,
    ROUTER_TIMEOUT_S,
    LoadReports,
)
from faasmoe_operator.control.sandbox_client import SandboxClientTimeouts
from faasmoe_operator.control.sandbox_prober import (
    MAX_CONSECUTIVE_TIMEOUTS,
)
from faasmoe_operator.plan.fleet import SandboxState
from faasmoe_operator.scaling import Phase

BUSY = LoadReport("r1", {"f0": FunctionLoad(1.0, calls=10)}, queued=0)
NO_GRACE = replace(FAST_SCALING, scale_to_zero_grace_period_s=0)


class FakeClock:
    """The controller's clock, which tests can advance."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() * CLOCK_SPEED + self.ahead_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(fake_platform, "fast_clock", clock)
    return clock


async def sleep_on_clock(controller: Controller, seconds: float) -> None:
    """Sleep for seconds of the controller's clock."""
    end = controller.clock() + seconds
    while controller.clock() < end:  # noqa: ASYNC110
        await asyncio.sleep(0.01)


def n_attaches(platform: FakePlatform) -> Counter[str]:
    calls = [call for server in platform.servers.values() for call in server.calls]
    return Counter(call.removeprefix("PUT ") for call in calls if call.startswith("PUT "))


async def activate(controller: Controller, *functions: str) -> None:
    controller.activate(functions)
    await eventually(
        lambda: routable_functions(controller) >= set(functions), "the functions are ready"
    )


def test_suspension_does_not_scale_down_functions_in_use(clock: FakeClock) -> None:
    async def scenario() -> None:
        async with controller_and_platform(make_model(2, scaling=NO_GRACE)) as (
            controller,
            platform,
        ):
            await activate(controller, "f0")
            async with reporting_load(controller, BUSY):
                await sleep_on_clock(controller, 8)
                before = n_attaches(platform)
                changes = controller.routing_table.version
            # SIGSTOP for ten minutes under load; the tick comes before the next load report.
            controller.add_load_report(BUSY)
            clock.ahead_s += 600
            controller.tick()
            assert controller.autoscalers.desired("f0") == 1
            async with reporting_load(controller, BUSY):
                await sleep_on_clock(controller, 10)
                assert routable_functions(controller) == {"f0"}
                assert n_attaches(platform)["f0"] == before["f0"] == 1
                assert controller.routing_table.version == changes

    asyncio.run(scenario())


@pytest.mark.parametrize("late_s", [2.0, 4.0, 30.0])
def test_late_tick_does_not_scale_down(clock: FakeClock, late_s: float) -> None:
    async def scenario() -> None:
        load = LoadReport("r1", {"f0": FunctionLoad(11.0, calls=10)})
        async with controller_and_platform(make_model(1, warm_pool=0)) as (controller, platform):
            controller.activate(["f0"])
            async with reporting_load(controller, load):
                await eventually(lambda: len(platform.sandboxes_with("f0")) == 4, "four replicas")
                await sleep_on_clock(controller, FAST_SCALING.window_s)
                for _ in range(3):
                    clock.ahead_s += late_s
                    controller.tick()
                    assert controller.autoscalers.desired("f0") == 4
                    await sleep_on_clock(controller, 2)

    asyncio.run(scenario())


def test_load_counts_until_it_ends_despite_a_late_tick() -> None:
    async def scenario() -> None:
        load = LoadReport("r1", {"f0": FunctionLoad(11.0, calls=10)})
        async with controller_and_platform(make_model(1, warm_pool=0)) as (controller, platform):
            controller.activate(["f0"])
            async with reporting_load(controller, load):
                await eventually(lambda: len(platform.sandboxes_with("f0")) == 4, "four replicas")
                await sleep_on_clock(controller, FAST_SCALING.window_s)
                controller.add_load_report(load)
                now = controller.clock() + 4.0
                controller.clock = lambda: now
                controller.add_load_report(LoadReport("r1"))
                controller.tick()
                average = controller.autoscalers.concurrency("f0", now=now)
                # The load lasted until the report without load, which is in the last second.
                assert average == pytest.approx(11.0 * 5 / 6, abs=1e-5)

    asyncio.run(scenario())


def test_idle_function_scales_to_zero_after_a_suspension(clock: FakeClock) -> None:
    async def scenario() -> None:
        async with controller_and_platform(make_model(1, scaling=NO_GRACE)) as (controller, _):
            await activate(controller, "f0")
            controller.add_load_report(BUSY)
            clock.ahead_s += 600
            controller.tick()
            controller.add_load_report(LoadReport("r1"))
            await eventually(lambda: not routable_functions(controller), "zero")

    asyncio.run(scenario())


def test_clock_skew_of_a_router_is_ignored() -> None:
    for sent_at_s in (0.0, time.time() - 7200, time.time() + 7200):
        report = (
            f'{{"router": "r1", "sent_at_s": {sent_at_s}, "interval_s": 1.0, "held": 0, "local": 0,'
            '"functions": {"f0": {"concurrency": 1.5, "calls": 3, "rows": 12}}}'
        )
        assert parse_load_report(report.encode(), known={"f0"}).functions["f0"].calls == 3
        activation = f'{{"router": "r1", "sent_at_s": {sent_at_s}, "functions": ["f0"]}}'
        assert parse_activation_request(activation.encode(), known={"f0"}) == ("f0",)


def test_functions_active_in_sandboxes_are_kept_when_a_router_is_lost() -> None:
    async def scenario() -> None:
        async with controller_and_platform(make_model(2, scaling=NO_GRACE)) as (
            controller,
            platform,
        ):
            await activate(controller, "f0", "f1")
            both = LoadReport("r1", {f: FunctionLoad(1.0, calls=1) for f in ("f0", "f1")})
            controller.add_load_report(both)  # and then never again
            active = next(s for s in platform.servers.values() if "f0" in s.functions)

            async def compute_frames() -> None:
                while True:
                    function = active.functions["f0"]
                    function["frames"] = function.get("frames", 0) + 5
                    await asyncio.sleep(0.01)

            computing = asyncio.create_task(compute_frames())
            await eventually(
                lambda: routable_functions(controller) == {"f0"}, "the inactive one is detached"
            )
            await sleep_on_clock(controller, 3 * ROUTER_TIMEOUT_S)
            assert routable_functions(controller) == {"f0"}
            computing.cancel()
            await eventually(lambda: not routable_functions(controller), "zero without activity")

    asyncio.run(scenario())


def test_sandbox_behind_a_partition_is_replaced() -> None:
    async def scenario() -> None:
        async with controller_and_platform(make_model(1)) as (controller, platform):
            await activate(controller, "f0")
            (lost,) = platform.sandboxes_with("f0")
            healed = asyncio.Event()

            async def hang(_: web.Request) -> web.Response:
                await healed.wait()
                return error_response(503, "draining")

            async with reporting_load(controller, BUSY):
                platform.servers[lost].fault_handler = hang
                await eventually(lambda: lost not in platform.servers, "the lost one is deleted")
                await eventually(
                    lambda: (
                        routable_functions(controller) == {"f0"}
                        and len(platform.sandboxes_with("f0")) == 1
                    ),
                    "one replica elsewhere",
                )
                assert controller.fleet.ready_replicas()["f0"] == 1
            healed.set()

    asyncio.run(scenario())


def test_short_partition_from_a_sandbox_changes_nothing() -> None:
    async def scenario() -> None:
        async with controller_and_platform(make_model(1)) as (controller, platform):
            await activate(controller, "f0")
            (holder,) = platform.sandboxes_with("f0")
            n_timeouts = 0

            async def hang_once(request: web.Request) -> web.Response | None:
                nonlocal n_timeouts
                if request.method != "GET" or n_timeouts >= 1:
                    return None
                n_timeouts += 1
                await asyncio.sleep(1.0)  # longer than the client's timeout
                return None

            async with reporting_load(controller, BUSY):
                version = controller.routing_table.version
                platform.servers[holder].fault_handler = hang_once
                await eventually(lambda: n_timeouts == 1, "a probe timed out")
                await sleep_on_clock(controller, 20)
                assert platform.sandboxes_with("f0") == [holder]
                assert controller.routing_table.version == version

    asyncio.run(scenario())


def test_activations_during_a_restart_attach_once() -> None:
    """A new controller adopts a function that the old one was attaching when it stopped."""

    async def scenario() -> None:
        platform, model = FakePlatform(), make_model(1)
        can_attach = asyncio.Event()

        async def slow_attach(request: web.Request) -> web.Response | None:
            if request.method == "PUT":
                await request.read()
                await can_attach.wait()
            return None

        platform.fault_handlers = [slow_attach]
        try:
            async with running_controller(model, platform) as first:
                await eventually(lambda: first.fleet.n_generic() == 1, "a generic sandbox")
                for _ in range(20):
                    first.activate(["f0"])
                await eventually(lambda: n_attaches(platform)["f0"] == 1, "the attach begins")
            can_attach.set()  # the controller has stopped, the sandbox completes the attach
            await eventually(lambda: len(platform.sandboxes_with("f0")) == 1, "the attach ends")
            async with running_controller(model, platform) as second:
                for _ in range(20):
                    second.activate(["f0"])
                async with reporting_load(second, BUSY):
                    await eventually(lambda: routable_functions(second) == {"f0"}, "adopted")
                    await sleep_on_clock(second, 10)
                    assert len(platform.sandboxes_with("f0")) == 1
                    assert n_attaches(platform)["f0"] == 1
        finally:
            await platform.close()

    asyncio.run(scenario())


def test_late_sandbox_is_read_back_before_the_table_is_published() -> None:
    """Otherwise routers would miss its functions in the table and activate them elsewhere."""

    async def scenario() -> None:
        platform, model = FakePlatform(), make_model(1)
        n_timeouts_left = MAX_CONSECUTIVE_TIMEOUTS - 1

        async def respond_late(request: web.Request) -> web.Response | None:
            nonlocal n_timeouts_left
            if request.method == "GET" and n_timeouts_left:
                n_timeouts_left -= 1
                await asyncio.sleep(2 * TIMEOUTS.list_timeout_s)
            return None

        try:
            async with running_controller(model, platform) as first:
                await activate(first, "f0")
            [holder] = platform.sandboxes_with("f0")
            platform.servers[holder].fault_handler = respond_late
            async with running_controller(model, platform) as second:
                assert routable_functions(second) == {"f0"}
                assert n_timeouts_left == 0
        finally:
            await platform.close()

    asyncio.run(scenario())
    assert (
        ControllerTiming().adopt_timeout_s
        >= MAX_CONSECUTIVE_TIMEOUTS * SandboxClientTimeouts().list_timeout_s
    )


def test_sandbox_without_an_address_does_not_delay_startup() -> None:
    async def scenario() -> None:
        platform, model = FakePlatform(), make_model(1, warm_pool=0)
        platform.add_pending("pending", model.template)
        timing = replace(fake_platform.TIMING, adopt_timeout_s=2 * DEADLINE_S)
        async with running_controller(model, platform, timing=timing) as controller:
            assert [s.state for s in controller.fleet.sandboxes] == [SandboxState.STARTING]

    asyncio.run(scenario())


def test_corrupted_function_is_retried_and_its_sandbox_stays() -> None:
    async def scenario() -> None:
        async with controller_and_platform(make_model(2, capacity=2, warm_pool=0)) as (
            controller,
            platform,
        ):
            await activate(controller, "f0")
            (holder,) = platform.sandboxes_with("f0")
            is_corrupted, n_attempts = True, 0

            async def refuse_corrupted(request: web.Request) -> web.Response | None:
                nonlocal n_attempts
                if request.method == "PUT" and request.path.endswith("f1") and is_corrupted:
                    n_attempts += 1
                    return error_response(503, "corrupted")
                return None

            platform.servers[holder].fault_handler = refuse_corrupted
            async with reporting_load(controller, BUSY):
                controller.activate(["f1"])
                await eventually(lambda: n_attempts >= 3, "retried")
                assert platform.sandboxes_with("f0") == [holder]
                assert "corrupted" in controller.failure
                is_corrupted = False
                await eventually(lambda: routable_functions(controller) == {"f0", "f1"}, "healed")
                assert platform.sandboxes_with("f0") == [holder]
                assert controller.autoscalers.phase("f1") is not Phase.INACTIVE

    asyncio.run(scenario())


def test_only_a_router_with_load_is_reported_as_lost() -> None:
    reports = LoadReports(now=0.0)
    reports.add(BUSY, now=0.0)
    reports.add(LoadReport("idle"), now=0.0)
    assert not reports.has_lost_router_with_load(ROUTER_TIMEOUT_S)
    assert reports.has_lost_router_with_load(ROUTER_TIMEOUT_S + 1)
    assert not reports.has_lost_router_with_load(ROUTER_TIMEOUT_S + 1 + PARTITION_GRACE_S)
    reports.add(BUSY, now=5000.0)
    assert not reports.has_lost_router_with_load(5000.0)


def test_skipped_suspension_does_not_age_reports() -> None:
    reports = LoadReports(now=0.0)
    reports.add(BUSY, now=100.0)
    reports.skip_suspension(101.0, 701.0)
    assert reports.concurrency(701.0) == {"f0": 1.0}
    assert reports.concurrency(701.0 + ROUTER_TIMEOUT_S) == {}


def test_an_activation_that_retrying_callers_wait_for_counts_as_timed_out_once() -> None:
    timing = replace(TIMING, activation_deadline_s=0.5)

    async def scenario() -> None:
        model = make_model(1, warm_pool=0)
        async with controller_and_platform(model, timing=timing) as (controller, platform):
            platform.is_broken = True
            waiting = LoadReport("r", {"f0": FunctionLoad(concurrency=1.0)})
            async with reporting_load(controller, waiting):
                controller.activate(["f0"])
                assert activations(controller, "timed_out") == 0.0
                await eventually(lambda: activations(controller, "timed_out") == 1.0)
                platform.is_broken = False
                await eventually(lambda: activations(controller, "ready") == 1.0)
            assert activations(controller, "timed_out") == 1.0

    asyncio.run(scenario())


def activations(controller: Controller, outcome: str) -> float | None:
    """Return the value of the activations counter."""
    name = "faasmoe_control_activations_total"
    return controller.metrics.registry.get_sample_value(name, {"outcome": outcome})
