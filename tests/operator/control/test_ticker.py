"""An idle controller makes the same decisions as one that never idles, and resumes in time."""

import asyncio
import math
from dataclasses import replace

import pytest
from fake_platform import (
    TIMING,
    FakePlatform,
    controller_and_platform,
    eventually,
    make_model,
    reporting_load,
    routable_functions,
    running_controller,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_time import run_in_virtual_time

from faasmoe_contracts.control_messages import FunctionLoad, LoadReport
from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_operator.control.autoscalers import FunctionAutoscalers, ObservedReplicas
from faasmoe_operator.control.controller import SUSPENDED_AFTER_S, Controller
from faasmoe_operator.control.functions import ManagedFunction
from faasmoe_operator.control.ticker import Ticker
from faasmoe_operator.scaling import ScalingSettings

ELASTIC = ScalingSettings(
    initial_scale=0, max_scale=8, target=4, window_s=6, panic_window_percentage=20,
    scale_to_zero_grace_period_s=2,
)  # fmt: skip
PINNED = replace(ELASTIC, min_scale=2)
DELAYED = replace(ELASTIC, min_scale=1, scale_down_delay_s=5, window_s=8)
SETTINGS = {"elastic": ELASTIC, "pinned": PINNED, "delayed": DELAYED}

Second = tuple[dict[str, float] | None, list[str]]
"""A second's load, None while it is unknown, and the functions activated in it."""


def functions() -> list[ManagedFunction]:
    return [
        ManagedFunction(FunctionSpec(name, (0,), (index,)), 1, scaling)
        for index, (name, scaling) in enumerate(SETTINGS.items())
    ]


class AutoscalerRun:
    """Autoscalers over seconds; replicas are ready as soon as they are desired."""

    def __init__(self, *, allows_idle: bool) -> None:
        observed = {name: ObservedReplicas(1, 1) for name in SETTINGS}
        self._autoscalers = FunctionAutoscalers(functions(), observed=observed, now=0.0)
        self._allows_idle = allows_idle
        self._is_idle = False
        self.n_decisions = 0

    def step(
        self, now: float, load: dict[str, float] | None, activated: list[str]
    ) -> dict[str, int]:
        has_events = any((load or {}).values()) or bool(activated)
        can_idle = self._allows_idle and self._autoscalers.is_idle(self.desired(), now=now)
        self._is_idle = not has_events and (self._is_idle or can_idle)
        if not self._is_idle:
            if self._autoscalers.has_unobserved_seconds(now):
                self._autoscalers.backfill(None if load is None else {}, now=now)
            self._autoscalers.activate(activated, now=now)
            self._autoscalers.observe(load, now=now)
            self._autoscalers.decide(self.desired(), now=now)
            self.n_decisions += 1
        return self.desired()

    def desired(self) -> dict[str, int]:
        return {name: self._autoscalers.desired(name) for name in SETTINGS}

    def phases(self) -> dict[str, str]:
        return {name: self._autoscalers.phase(name).value for name in SETTINGS}


loads = st.dictionaries(
    st.sampled_from(sorted(SETTINGS)), st.sampled_from([0.0, 0.3, 2.9, 11.0, 60])
)
seconds = st.tuples(loads, st.lists(st.sampled_from(sorted(SETTINGS)), max_size=1))
NOTHING: Second = ({}, [])
quiet = st.integers(1, 40).map(lambda n: [NOTHING] * n)
scenarios = st.lists(st.one_of(seconds.map(lambda s: [s]), quiet), min_size=1, max_size=20)


@settings(max_examples=300)
@given(scenario=scenarios, n_unknown=st.integers(0, 5))
def test_decisions_are_the_same_with_and_without_idling(
    scenario: list[list[Second]], n_unknown: int
) -> None:
    never_idle, with_idle = AutoscalerRun(allows_idle=False), AutoscalerRun(allows_idle=True)
    unknown: list[Second] = [(None, [])] * n_unknown
    for at, (load, activated) in enumerate(
        [*unknown, *(s for part in scenario for s in part)], start=1
    ):
        expected = never_idle.step(float(at), load, activated)
        assert with_idle.step(float(at), load, activated) == expected, f"second {at}"
        assert with_idle.phases() == never_idle.phases(), f"second {at}"


def test_idle_model_needs_no_decisions_once_it_has_settled() -> None:
    run = AutoscalerRun(allows_idle=True)
    for at in range(1, 1000):
        run.step(float(at), {}, [])
    assert run.desired() == {"elastic": 0, "pinned": 2, "delayed": 1}
    assert run.n_decisions < 20


def test_idle_controller_has_no_passes_and_no_decisions() -> None:
    async def scenario() -> None:
        async with controller_and_platform(make_model(3, warm_pool=1)) as (controller, _):
            ticks = count_ticks(controller)
            controller.activate(["f1"])
            await eventually(lambda: routable_functions(controller) == {"f1"})
            controller.add_load_report(LoadReport("r"))
            await eventually(lambda: not routable_functions(controller), "zero")
            await eventually(lambda: ticks.is_idle(), "idle")
            revision = controller.revision
            for _ in range(10):
                controller.add_load_report(LoadReport("r"))  # as an idle router does
                await asyncio.sleep(TIMING.tick_s)
            assert controller.revision == revision
            async with reporting_load(controller, LoadReport("r", {"f2": FunctionLoad(1.0, 1, 1)})):
                await eventually(lambda: routable_functions(controller) == {"f2"}, "resumed")

    asyncio.run(scenario())


def test_load_after_idling_is_not_mistaken_for_a_suspension(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        pinned = replace(ELASTIC, min_scale=1)
        async with controller_and_platform(make_model(1, warm_pool=0, scaling=pinned)) as (
            controller,
            _,
        ):
            ticks = count_ticks(controller)
            await eventually(lambda: routable_functions(controller) == {"f0"})
            controller.add_load_report(LoadReport("r"))
            await eventually(lambda: ticks.is_idle(), "idle")
            await asyncio.sleep(2 * SUSPENDED_AFTER_S * TIMING.tick_s)
            n_before, busy = ticks.n, LoadReport("r", {"f0": FunctionLoad(1.0, 1, 1)})
            controller.add_load_report(busy)
            # The idle seconds are recorded without load; the new load counts from the next tick on.
            assert controller.autoscalers.concurrency("f0", now=controller.clock()) == 0.0
            async with reporting_load(controller, busy):
                await eventually(lambda: ticks.n > n_before, "resumed")

    asyncio.run(scenario())
    assert "was suspended" not in caplog.text


def test_idle_controller_replaces_a_lost_sandbox() -> None:
    async def scenario() -> None:
        async with controller_and_platform(make_model(1, warm_pool=1)) as (controller, platform):
            ticks = count_ticks(controller)
            controller.add_load_report(LoadReport("r"))
            await eventually(lambda: controller.fleet.n_generic() == 1 and ticks.is_idle())
            (lost,) = platform.servers
            await platform.kill(lost)
            await eventually(lambda: bool(platform.servers) and controller.fleet.n_generic() == 1)
            assert lost not in platform.servers

    asyncio.run(scenario())


class NeverReady(FakePlatform):
    """A platform whose sandboxes never become ready."""

    async def list(self) -> tuple:  # type: ignore[type-arg]
        return tuple(replace(sandbox, ready=False) for sandbox in await super().list())


def test_idle_controller_enforces_the_start_deadline() -> None:
    async def scenario() -> None:

        platform, timing = NeverReady(), replace(TIMING, start_deadline_s=40.0)
        try:
            async with running_controller(
                make_model(1, warm_pool=1), platform, timing=timing
            ) as controller:
                ticks = count_ticks(controller)
                await eventually(lambda: ticks.is_idle(), "idle while it starts")
                (late,) = platform.servers
                await eventually(lambda: platform.n_created >= 2 and late not in platform.servers)
                assert "was not ready in time" in controller.failure
        finally:
            await platform.close()

    asyncio.run(scenario())


class TickCounter:
    """Counts a controller's ticks."""

    def __init__(self) -> None:
        self.n = 0
        self._seen = (0, 0.0)

    def is_idle(self) -> bool:
        """Return whether there has been no tick for ten periods."""
        now = asyncio.get_running_loop().time()
        if self._seen[0] != self.n or self._seen[1] == 0.0:
            self._seen = (self.n, now)
        return now - self._seen[1] > 10 * TIMING.tick_s


def count_ticks(controller: Controller) -> TickCounter:
    ticks, tick = TickCounter(), controller.autoscalers.decide

    def counted(*args: object, **kwargs: object) -> object:
        ticks.n += 1
        return tick(*args, **kwargs)  # type: ignore[arg-type]

    controller.autoscalers.decide = counted  # type: ignore[method-assign, assignment]
    return ticks


def test_ticks_stay_on_the_grid_after_idling() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        ticks: list[float] = []
        idle_times = iter([None, math.inf, None, None])
        ticker = Ticker(0.05, idle_until=lambda _: next(idle_times), clock=lambda: 0.5)
        started_s = loop.time()

        def on_tick() -> None:
            ticks.append(loop.time() - started_s)
            if len(ticks) == 4:
                raise TimeoutError

        running = asyncio.create_task(ticker.run(on_tick))
        loop.call_later(0.23, ticker.notify)
        await asyncio.gather(running, return_exceptions=True)
        assert ticks[1] - ticks[0] > 0.15  # idle until it was notified
        for at in ticks:
            assert at / 0.05 == pytest.approx(round(at / 0.05), abs=1e-6), ticks

    run_in_virtual_time(scenario())


def test_ticks_are_in_the_middle_of_the_clocks_seconds() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        started_s, ticks = loop.time(), list[float]()

        def clock() -> float:
            return (loop.time() - started_s) / 0.2

        def on_tick() -> None:
            ticks.append(clock())
            if len(ticks) == 3:
                raise TimeoutError

        ticker = Ticker(0.2, idle_until=lambda _: None, clock=clock)
        await asyncio.gather(ticker.run(on_tick), return_exceptions=True)
        for at in ticks:
            assert at % 1.0 == pytest.approx(0.5, abs=1e-6), ticks

    run_in_virtual_time(scenario())
