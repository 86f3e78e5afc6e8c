"""A control core that rests decides what one that never does would have decided."""

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

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_operator.control.autoscalers import FunctionAutoscalers, ObservedReplicas
from faasmoe_operator.control.controller import SUSPENDED_AFTER_S, Controller
from faasmoe_operator.control.functions import ManagedFunction
from faasmoe_operator.control.load_reports import LoadReport, ReportedLoad
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
"""A second's load, None while nothing is known, and the functions woken in it."""


def functions() -> list[ManagedFunction]:
    return [
        ManagedFunction(FunctionSpec(name, (0,), (index,)), 1, given)
        for index, (name, given) in enumerate(SETTINGS.items())
    ]


class AutoscalerRun:
    """Scalers over seconds; replicas are ready as soon as they are wanted."""

    def __init__(self, *, allows_idle: bool) -> None:
        found = {name: ObservedReplicas(1, 1) for name in SETTINGS}
        self._scalers = FunctionAutoscalers(functions(), observed=found, now=0.0)
        self._allows_idle = allows_idle
        self._resting = False
        self.n_decisions = 0

    def step(self, now: float, load: dict[str, float] | None, woken: list[str]) -> dict[str, int]:
        is_silent = not any((load or {}).values()) and not woken
        begins = self._allows_idle and self._scalers.is_idle(self.desired(), now=now)
        self._resting = is_silent and (self._resting or begins)
        if not self._resting:
            if self._scalers.has_unobserved_seconds(now):
                self._scalers.backfill(None if load is None else {}, now=now)
            self._scalers.activate(woken, now=now)
            self._scalers.observe(load, now=now)
            self._scalers.decide(self.desired(), now=now)
            self.n_decisions += 1
        return self.desired()

    def desired(self) -> dict[str, int]:
        return {name: self._scalers.desired(name) for name in SETTINGS}

    def phases(self) -> dict[str, str]:
        return {name: self._scalers.phase(name).value for name in SETTINGS}


loads = st.dictionaries(
    st.sampled_from(sorted(SETTINGS)), st.sampled_from([0.0, 0.3, 2.9, 11.0, 60])
)
seconds = st.tuples(loads, st.lists(st.sampled_from(sorted(SETTINGS)), max_size=1))
NOTHING: Second = ({}, [])
quiet = st.integers(1, 40).map(lambda n: [NOTHING] * n)
scenarios = st.lists(st.one_of(seconds.map(lambda s: [s]), quiet), min_size=1, max_size=20)


@settings(max_examples=300)
@given(story=scenarios, n_unknown=st.integers(0, 5))
def test_decisions_are_the_same_with_and_without_rest(
    story: list[list[Second]], n_unknown: int
) -> None:
    always, resting = AutoscalerRun(allows_idle=False), AutoscalerRun(allows_idle=True)
    unknown: list[Second] = [(None, [])] * n_unknown
    for at, (load, woken) in enumerate([*unknown, *(s for part in story for s in part)], start=1):
        expected = always.step(float(at), load, woken)
        assert resting.step(float(at), load, woken) == expected, f"second {at}"
        assert resting.phases() == always.phases(), f"second {at}"


def test_an_idle_model_is_decided_about_until_it_is_at_zero_and_then_never() -> None:
    run = AutoscalerRun(allows_idle=True)
    for at in range(1, 1000):
        run.step(float(at), {}, [])
    assert run.desired() == {"elastic": 0, "pinned": 2, "delayed": 1}
    assert run.n_decisions < 20


def test_an_idle_core_makes_no_rounds_and_no_decisions() -> None:
    async def story() -> None:
        async with controller_and_platform(make_model(3, warm_pool=1)) as (controller, _):
            ticks = count_ticks(controller)
            controller.activate(["f1"])
            await eventually(lambda: routable_functions(controller) == {"f1"})
            controller.add_load_report(LoadReport("r"))
            await eventually(lambda: not routable_functions(controller), "zero")
            await eventually(lambda: ticks.is_idle(), "rest")
            revision = controller.revision
            for _ in range(10):
                controller.add_load_report(
                    LoadReport("r")
                )  # as a router does that has nothing to do
                await asyncio.sleep(TIMING.tick_s)
            assert controller.revision == revision
            async with reporting_load(controller, LoadReport("r", {"f2": ReportedLoad(1.0, 1, 1)})):
                await eventually(lambda: routable_functions(controller) == {"f2"}, "roused by load")

    asyncio.run(story())


def test_load_after_a_rest_is_not_taken_for_a_stop(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        pinned = replace(ELASTIC, min_scale=1)
        async with controller_and_platform(make_model(1, warm_pool=0, scaling=pinned)) as (
            controller,
            _,
        ):
            ticks = count_ticks(controller)
            await eventually(lambda: routable_functions(controller) == {"f0"})
            controller.add_load_report(LoadReport("r"))
            await eventually(lambda: ticks.is_idle(), "rest")
            await asyncio.sleep(2 * SUSPENDED_AFTER_S * TIMING.tick_s)
            begun, busy = ticks.n, LoadReport("r", {"f0": ReportedLoad(1.0, 1, 1)})
            controller.add_load_report(busy)
            assert controller.autoscalers.concurrency("f0", now=controller.clock()) == 0.0  # as yet
            async with reporting_load(controller, busy):
                await eventually(lambda: ticks.n > begun, "roused by load")

    asyncio.run(story())
    assert "was suspended" not in caplog.text


def test_a_core_at_rest_replaces_a_sandbox_that_is_lost() -> None:
    async def story() -> None:
        async with controller_and_platform(make_model(1, warm_pool=1)) as (controller, boxes):
            ticks = count_ticks(controller)
            controller.add_load_report(LoadReport("r"))
            await eventually(lambda: controller.fleet.n_generic() == 1 and ticks.is_idle())
            (lost,) = boxes.servers
            await boxes.kill(lost)
            await eventually(lambda: bool(boxes.servers) and controller.fleet.n_generic() == 1)
            assert lost not in boxes.servers

    asyncio.run(story())


class NeverReady(FakePlatform):
    """A platform whose sandboxes never become ready."""

    async def list(self) -> tuple:  # type: ignore[type-arg]
        return tuple(replace(sandbox, ready=False) for sandbox in await super().list())


def test_a_core_at_rest_wakes_for_the_deadline_of_a_sandbox_that_starts() -> None:
    async def story() -> None:

        boxes, timing = NeverReady(), replace(TIMING, start_deadline_s=40.0)
        try:
            async with running_controller(
                make_model(1, warm_pool=1), boxes, timing=timing
            ) as controller:
                ticks = count_ticks(controller)
                await eventually(lambda: ticks.is_idle(), "rest while it starts")
                (late,) = boxes.servers
                await eventually(lambda: boxes.n_created >= 2 and late not in boxes.servers)
                assert "was not ready in time" in controller.failure
        finally:
            await boxes.close()

    asyncio.run(story())


class TickCounter:
    """Counts a controller's ticks."""

    def __init__(self) -> None:
        self.n = 0
        self._seen = (0, 0.0)

    def is_idle(self) -> bool:
        """Return whether there has been none for ten periods."""
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


def test_a_pulse_keeps_to_its_grid_whatever_it_rested() -> None:
    async def story() -> None:
        loop = asyncio.get_running_loop()
        beats: list[float] = []
        rests = iter([None, math.inf, None, None])
        pulse = Ticker(0.05, idle_until=lambda _: next(rests), clock=lambda: 0.5)
        begun_s = loop.time()

        def beat() -> None:
            beats.append(loop.time() - begun_s)
            if len(beats) == 4:
                raise TimeoutError

        running = asyncio.create_task(pulse.run(beat))
        loop.call_later(0.23, pulse.notify)
        await asyncio.gather(running, return_exceptions=True)
        assert beats[1] - beats[0] > 0.15  # rested until it was roused
        for at in beats:
            assert at % 0.05 < 0.045, beats

    asyncio.run(story())


def test_a_pulse_beats_in_the_middle_of_the_clocks_seconds() -> None:
    async def story() -> None:
        loop = asyncio.get_running_loop()
        begun_s, beats = loop.time(), list[float]()

        def clock() -> float:
            return (loop.time() - begun_s) / 0.2

        def beat() -> None:
            beats.append(clock())
            if len(beats) == 3:
                raise TimeoutError

        pulse = Ticker(0.2, idle_until=lambda _: None, clock=clock)
        await asyncio.gather(pulse.run(beat), return_exceptions=True)
        for at in beats:
            assert at % 1.0 >= 0.49, beats

    asyncio.run(story())
