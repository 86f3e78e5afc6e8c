"""Scenarios with a fake clock: load every second, a decision every two seconds, as in Knative."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faasmoe_operator.scaling import Decision, FunctionAutoscaler, Phase, Reason, ScalingSettings
from faasmoe_operator.scaling.settings import ScalingError
from faasmoe_operator.scaling.windows import LoadAverages, NoData

TICK_S = 2
START_S = 1000


class ScalingScenario:
    """One function whose replicas become ready `starts_in_s` after they are desired."""

    def __init__(
        self, autoscaler: FunctionAutoscaler, *, ready: int = 0, starts_in_s: int = 0
    ) -> None:
        self.autoscaler = autoscaler
        self.now = START_S
        self.ready = ready
        self.decisions: list[Decision] = []
        self._starts_in_s = starts_in_s
        self._due: list[tuple[int, int]] = []
        self.apply(Decision(autoscaler.desired, Reason.NO_DATA))

    def advance(self, seconds: int, *, calls: float | None) -> Decision:
        """Advance the clock with this many calls in flight; None for no reports."""
        for _ in range(seconds):
            self.now += 1
            self._become_ready()
            if calls is not None:
                self.autoscaler.observe(self.now, calls)
            if self.now % TICK_S == 0:
                self.apply(self.autoscaler.decide(self.now, ready=self.ready))
        return self.decisions[-1]

    def apply(self, decision: Decision) -> Decision:
        self.decisions.append(decision)
        self.ready = min(self.ready, decision.desired)
        self._due.append((self.now + self._starts_in_s, decision.desired))
        return decision

    def _become_ready(self) -> None:
        due = [replicas for at, replicas in self._due if at <= self.now]
        self.ready = min(max([self.ready, *due]), self.autoscaler.desired)
        self._due = [(at, replicas) for at, replicas in self._due if at > self.now]

    def phase(self) -> Phase:
        return self.autoscaler.phase

    def desired(self) -> list[int]:
        return [decision.desired for decision in self.decisions]


def scaling_settings(**settings: Any) -> ScalingSettings:
    """Return settings with ten calls per replica, for simple arithmetic."""
    return ScalingSettings(**{"target": 10, "target_utilization_percentage": 100, **settings})


def running(replicas: int = 1, **settings: Any) -> ScalingScenario:
    autoscaler = FunctionAutoscaler.restored(
        scaling_settings(**settings), replicas=replicas, ready=replicas, now=START_S
    )
    return ScalingScenario(autoscaler, ready=replicas)


def at_zero(*, starts_in_s: int = 0, **settings: Any) -> ScalingScenario:
    autoscaler = FunctionAutoscaler.restored(
        scaling_settings(**settings), replicas=0, ready=0, now=START_S
    )
    return ScalingScenario(autoscaler, starts_in_s=starts_in_s)


def test_scales_to_zero_after_the_stable_window_and_the_grace_period() -> None:
    scenario = running()
    scenario.advance(120, calls=5)
    # 58 s: two seconds of calls are still in the window, (2 * 5) / 60 > 0: one replica.
    assert scenario.advance(58, calls=0) == Decision(1, Reason.STABLE)
    # 60 s: the window holds zeros only; active for more than a window: the grace period begins.
    assert scenario.advance(2, calls=0) == Decision(1, Reason.GRACE_PERIOD)
    assert scenario.phase() is Phase.DRAINING
    assert scenario.advance(28, calls=0) == Decision(1, Reason.GRACE_PERIOD)
    assert scenario.advance(2, calls=0) == Decision(0, Reason.NO_TRAFFIC)
    assert scenario.phase() is Phase.INACTIVE
    assert scenario.advance(600, calls=0) == Decision(0, Reason.NO_TRAFFIC)


def test_longer_retention_period_extends_the_grace_period() -> None:
    scenario = running(scale_to_zero_pod_retention_period_s=45)
    scenario.advance(60, calls=5)
    assert scenario.advance(60 + 44, calls=0) == Decision(1, Reason.GRACE_PERIOD)
    assert scenario.advance(2, calls=0) == Decision(0, Reason.NO_TRAFFIC)


def test_activation_during_the_grace_period_restarts_it() -> None:
    scenario = running()
    scenario.advance(60, calls=5)
    scenario.advance(80, calls=0)
    assert scenario.phase() is Phase.DRAINING
    assert scenario.autoscaler.activate(scenario.now) == Decision(1, Reason.ALREADY_ACTIVE)
    assert scenario.phase() is Phase.ACTIVE
    assert scenario.advance(59, calls=0) == Decision(1, Reason.STABLE_WINDOW)
    assert scenario.advance(30, calls=0) == Decision(1, Reason.GRACE_PERIOD)
    assert scenario.advance(2, calls=0) == Decision(0, Reason.NO_TRAFFIC)


def test_concurrent_activations_scale_from_zero_to_one_without_a_tick() -> None:
    scenario = at_zero()
    assert scenario.autoscaler.activate(START_S + 0.5) == Decision(1, Reason.ACTIVATED)
    assert scenario.phase() is Phase.ACTIVATING
    for _ in range(100):
        assert scenario.autoscaler.activate(START_S + 0.6) == Decision(1, Reason.ALREADY_ACTIVE)
    assert scenario.autoscaler.desired == 1


def test_activation_scales_to_the_activation_scale() -> None:
    scenario = at_zero(activation_scale=3, max_scale=8)
    assert scenario.autoscaler.activate(START_S) == Decision(3, Reason.ACTIVATED)


def test_activated_function_without_load_returns_to_zero() -> None:
    scenario = at_zero(starts_in_s=4)
    scenario.apply(scenario.autoscaler.activate(START_S))
    assert scenario.advance(2, calls=0) == Decision(1, Reason.ACTIVATING)
    assert scenario.advance(2, calls=0) == Decision(1, Reason.STABLE_WINDOW)  # ready at 4 s
    assert scenario.advance(58, calls=0) == Decision(1, Reason.STABLE_WINDOW)
    assert scenario.advance(2, calls=0) == Decision(1, Reason.GRACE_PERIOD)
    assert scenario.advance(30, calls=0) == Decision(0, Reason.NO_TRAFFIC)


def test_burst_after_a_long_idle_time_counts_in_full() -> None:
    scenario = at_zero()
    scenario.advance(300, calls=0)  # a function at zero: not recorded
    scenario.autoscaler.activate(scenario.now)
    # 32 calls over the 2 s since the first write, not over 60: ceil(32 / 10) = 4.
    assert scenario.advance(2, calls=32).desired == 4


def test_starting_replica_is_never_removed_without_load() -> None:
    scenario = at_zero(starts_in_s=300)
    scenario.apply(scenario.autoscaler.activate(START_S))
    assert scenario.advance(298, calls=0) == Decision(1, Reason.ACTIVATING)
    assert scenario.advance(2, calls=0) == Decision(1, Reason.STABLE_WINDOW)


def test_activation_times_out_after_the_progress_deadline() -> None:
    scenario = at_zero(starts_in_s=10_000)
    scenario.apply(scenario.autoscaler.activate(START_S))
    assert scenario.advance(598, calls=0) == Decision(1, Reason.ACTIVATING)
    assert scenario.advance(2, calls=0) == Decision(0, Reason.TIMED_OUT)
    assert scenario.advance(2, calls=0) == Decision(0, Reason.NO_TRAFFIC)
    assert scenario.autoscaler.activate(scenario.now) == Decision(1, Reason.ACTIVATED)


def test_new_deployment_keeps_its_initial_scale_until_ready() -> None:
    autoscaler = FunctionAutoscaler.for_new_function(scaling_settings(initial_scale=3), now=START_S)
    scenario = ScalingScenario(autoscaler, starts_in_s=20)
    assert scenario.advance(2, calls=None) == Decision(3, Reason.NO_DATA)
    assert scenario.advance(16, calls=0) == Decision(3, Reason.INITIAL_SCALE)
    assert scenario.advance(2, calls=0) == Decision(1, Reason.SCALE_DOWN_RATE)  # floor(3 / 2)
    assert scenario.advance(100, calls=0) == Decision(0, Reason.NO_TRAFFIC)


def test_initial_scale_of_zero_starts_no_replica() -> None:
    autoscaler = FunctionAutoscaler.for_new_function(scaling_settings(initial_scale=0), now=START_S)
    assert (autoscaler.desired, autoscaler.phase) == (0, Phase.INACTIVE)
    assert ScalingScenario(autoscaler).advance(60, calls=0) == Decision(0, Reason.NO_TRAFFIC)


def test_new_deployment_times_out_after_the_progress_deadline() -> None:
    scenario = ScalingScenario(
        FunctionAutoscaler.for_new_function(scaling_settings(), now=START_S), starts_in_s=10_000
    )
    assert scenario.advance(598, calls=0) == Decision(1, Reason.INITIAL_SCALE)
    assert scenario.advance(2, calls=0) == Decision(0, Reason.TIMED_OUT)


def test_burst_panics_for_a_stable_window_and_then_scales_down_by_halves() -> None:
    scenario = running()
    scenario.advance(120, calls=8)
    # 80 calls for 6 s. After 2 s the panic average is (4 * 8 + 2 * 80) / 6 = 32: 4 replicas of 1
    # ready, panic. After 4 s it is 56: 6 of 4, below the threshold. After 6 s it is 80: 8.
    assert scenario.advance(6, calls=80) == Decision(8, Reason.PANIC)
    assert scenario.autoscaler.is_panicking
    # Last over the threshold 2 s into the burst: panic until 62 s inclusive, over at 64 s.
    assert scenario.advance(56, calls=8) == Decision(8, Reason.PANIC_HOLD)
    assert scenario.advance(2, calls=8) == Decision(4, Reason.SCALE_DOWN_RATE)
    scenario.advance(10, calls=8)
    down = [n for n in scenario.desired()[63:] if n < 8]
    assert down[:4] == [4, 2, 1, 1]  # at most half of the ready replicas are removed at once


def test_restart_does_not_scale_down_for_a_stable_window() -> None:
    scenario = running(replicas=6)
    assert scenario.advance(60, calls=10) == Decision(6, Reason.PANIC_HOLD)
    assert scenario.advance(2, calls=10) == Decision(3, Reason.SCALE_DOWN_RATE)


def test_restart_keeps_a_starting_function() -> None:
    autoscaler = FunctionAutoscaler.restored(scaling_settings(), replicas=1, ready=0, now=START_S)
    assert autoscaler.phase is Phase.ACTIVATING
    assert autoscaler.decide(START_S, ready=0) == Decision(1, Reason.NO_DATA)


def test_keeps_replicas_without_load_reports() -> None:
    scenario = running()
    scenario.advance(60, calls=35)
    assert scenario.ready == 4
    assert scenario.advance(59, calls=None).desired == 4
    assert scenario.advance(3600, calls=None) == Decision(4, Reason.NO_DATA)
    assert set(scenario.desired()[30:]) == {4}


def test_min_scale_prevents_scale_to_zero() -> None:
    scenario = running(min_scale=1)
    assert scenario.advance(600, calls=0) == Decision(1, Reason.MIN_SCALE)
    assert scenario.phase() is Phase.ACTIVE


def test_one_replica_remains_if_scale_to_zero_is_disabled() -> None:
    scenario = running(enable_scale_to_zero=False)
    assert scenario.advance(600, calls=0) == Decision(1, Reason.SCALE_TO_ZERO_DISABLED)


def test_replica_lost_under_load_is_desired_again_and_activating() -> None:
    scenario = running()
    scenario.advance(60, calls=5)
    assert scenario.autoscaler.decide(scenario.now + 1, ready=0) == Decision(1, Reason.STABLE)
    assert scenario.phase() is Phase.ACTIVATING


def test_reconfigure_applies_settings_and_keeps_the_load_history() -> None:
    scenario = running()
    scenario.advance(60, calls=20)
    assert scenario.ready == 2
    scenario.autoscaler.reconfigure(scaling_settings(target=5, window_s=30))
    assert scenario.autoscaler.settings.window_s == 30
    assert scenario.autoscaler.load(scenario.now) == LoadAverages(stable=20, panic=20)
    assert scenario.advance(2, calls=20) == Decision(4, Reason.STABLE)


def test_reconfigured_min_scale_starts_a_function_at_zero() -> None:
    scenario = at_zero()
    scenario.autoscaler.reconfigure(scaling_settings(min_scale=2))
    assert scenario.advance(2, calls=None) == Decision(2, Reason.MIN_SCALE)
    assert scenario.phase() is Phase.ACTIVATING


def test_load_of_several_routers_is_summed() -> None:
    autoscaler = FunctionAutoscaler.restored(scaling_settings(), replicas=1, ready=1, now=0)
    for second in range(10):
        autoscaler.observe(second + 0.1, 4)
        autoscaler.observe(second + 0.7, 3)
    assert autoscaler.load(9.9) == LoadAverages(stable=7, panic=7)


def test_function_without_reports_has_no_data() -> None:
    autoscaler = FunctionAutoscaler.restored(scaling_settings(), replicas=1, ready=1, now=0)
    assert autoscaler.load(5) == NoData()


@pytest.mark.parametrize("concurrency", [-1, math.nan, math.inf])
def test_invalid_load_is_rejected_without_effect(concurrency: float) -> None:
    autoscaler = FunctionAutoscaler.restored(scaling_settings(), replicas=1, ready=1, now=0)
    with pytest.raises(ScalingError, match="concurrency: got"):
        autoscaler.observe(1, concurrency)
    assert autoscaler.load(1) == NoData()


calls_st = st.one_of(st.none(), st.integers(0, 400))
steps_st = st.lists(st.tuples(st.integers(1, 40), calls_st, st.booleans()), max_size=12)
scaling_st = st.builds(
    lambda low, span, **other: scaling_settings(
        min_scale=low, max_scale=max(1, low + span), initial_scale=low, **other
    ),
    st.integers(0, 2),
    st.integers(0, 12),
    window_s=st.sampled_from([6, 20, 60]),
    panic_window_percentage=st.sampled_from([20, 100]),
    scale_to_zero_grace_period_s=st.sampled_from([0, 5, 30]),
    scale_down_delay_s=st.sampled_from([0, 9]),
    enable_scale_to_zero=st.booleans(),
)


@given(scaling=scaling_st, steps=steps_st, starts_in_s=st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_replicas_stay_within_bounds_and_reach_zero_only_from_one(
    scaling: ScalingSettings, steps: list[tuple[int, float | None, bool]], starts_in_s: int
) -> None:
    scenario = ScalingScenario(
        FunctionAutoscaler.for_new_function(scaling, now=START_S), starts_in_s=starts_in_s
    )
    for seconds, calls, is_activated in steps:
        if is_activated:
            expected = max(1, scenario.autoscaler.desired)
            assert scenario.apply(scenario.autoscaler.activate(scenario.now)).desired == expected
        scenario.advance(seconds, calls=calls)
    for decision in scenario.decisions[1:]:
        assert scaling.min_scale <= decision.desired <= scaling.max_scale
        if decision.desired == 0:
            assert scaling.enable_scale_to_zero
            assert decision.reason in {Reason.NO_TRAFFIC, Reason.TIMED_OUT}
    for before, after in pairwise(scenario.desired()):
        if after == 0 < before:
            assert before == 1


@given(
    history=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 300)), max_size=6),
    calls=st.integers(0, 300),
    scaling=scaling_st,
)
@settings(max_examples=60, deadline=None)
def test_constant_load_settles(
    history: list[tuple[int, int]], calls: int, scaling: ScalingSettings
) -> None:
    scenario = ScalingScenario(FunctionAutoscaler.for_new_function(scaling, now=START_S))
    for seconds, earlier in history:
        scenario.advance(seconds, calls=earlier)
    # Old load leaves the windows, panic ends, delay and grace period pass: then it is stable.
    scenario.advance(240, calls=calls)
    n_settled = len(scenario.decisions)
    scenario.advance(120, calls=calls)
    minimum = max(scaling.min_scale, 0 if scaling.enable_scale_to_zero else 1)
    expected = max(minimum, min(scaling.max_scale, math.ceil(calls / 10)))
    assert set(scenario.desired()[n_settled:]) == {expected}


@given(calls=st.integers(1, 300), scaling=scaling_st)
@settings(max_examples=60, deadline=None)
def test_constant_load_from_zero_never_scales_down(calls: int, scaling: ScalingSettings) -> None:
    scenario = ScalingScenario(
        FunctionAutoscaler.restored(scaling, replicas=0, ready=0, now=START_S)
    )
    scenario.apply(scenario.autoscaler.activate(scenario.now))
    scenario.advance(200, calls=calls)
    assert scenario.desired() == sorted(scenario.desired())
