"""Stories told by moving the clock: reports each second, a decision every two, as in Knative."""

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
    """One function whose replicas become ready `starts_in_s` after they are wanted."""

    def __init__(self, scaler: FunctionAutoscaler, *, ready: int = 0, starts_in_s: int = 0) -> None:
        self.scaler = scaler
        self.now = START_S
        self.ready = ready
        self.decisions: list[Decision] = []
        self._starts_in_s = starts_in_s
        self._due: list[tuple[int, int]] = []
        self.apply(Decision(scaler.desired, Reason.NO_DATA))

    def advance(self, seconds: int, *, calls: float | None) -> Decision:
        """Let time pass with this many calls in flight; None: nobody reports."""
        for _ in range(seconds):
            self.now += 1
            self._become_ready()
            if calls is not None:
                self.scaler.observe(self.now, calls)
            if self.now % TICK_S == 0:
                self.apply(self.scaler.decide(self.now, ready=self.ready))
        return self.decisions[-1]

    def apply(self, decision: Decision) -> Decision:
        self.decisions.append(decision)
        self.ready = min(self.ready, decision.desired)
        self._due.append((self.now + self._starts_in_s, decision.desired))
        return decision

    def _become_ready(self) -> None:
        due = [replicas for at, replicas in self._due if at <= self.now]
        self.ready = min(max([self.ready, *due]), self.scaler.desired)
        self._due = [(at, replicas) for at, replicas in self._due if at > self.now]

    def phase(self) -> Phase:
        return self.scaler.phase

    def desired(self) -> list[int]:
        return [decision.desired for decision in self.decisions]


def scaling_settings(**settings: Any) -> ScalingSettings:
    """Ten calls a replica, to keep the arithmetic plain."""
    return ScalingSettings(**{"target": 10, "target_utilization_percentage": 100, **settings})


def running(replicas: int = 1, **settings: Any) -> ScalingScenario:
    scaler = FunctionAutoscaler.restored(
        scaling_settings(**settings), replicas=replicas, ready=replicas, now=START_S
    )
    return ScalingScenario(scaler, ready=replicas)


def at_zero(*, starts_in_s: int = 0, **settings: Any) -> ScalingScenario:
    scaler = FunctionAutoscaler.restored(
        scaling_settings(**settings), replicas=0, ready=0, now=START_S
    )
    return ScalingScenario(scaler, starts_in_s=starts_in_s)


def test_sixty_seconds_without_traffic_then_thirty_of_grace_now_zero() -> None:
    story = running()
    story.advance(120, calls=5)
    # 58 s: one second of calls is still in the window, (2 * 5) / 60 > 0: one replica.
    assert story.advance(58, calls=0) == Decision(1, Reason.STABLE)
    # 60 s: the window holds zeros only; active for more than a window, so the grace begins.
    assert story.advance(2, calls=0) == Decision(1, Reason.GRACE_PERIOD)
    assert story.phase() is Phase.DRAINING
    assert story.advance(28, calls=0) == Decision(1, Reason.GRACE_PERIOD)
    assert story.advance(2, calls=0) == Decision(0, Reason.NO_TRAFFIC)
    assert story.phase() is Phase.INACTIVE
    assert story.advance(600, calls=0) == Decision(0, Reason.NO_TRAFFIC)


def test_the_retention_period_keeps_the_last_replica_longer_than_the_grace() -> None:
    story = running(scale_to_zero_pod_retention_period_s=45)
    story.advance(60, calls=5)
    assert story.advance(60 + 44, calls=0) == Decision(1, Reason.GRACE_PERIOD)
    assert story.advance(2, calls=0) == Decision(0, Reason.NO_TRAFFIC)


def test_a_call_during_the_grace_makes_it_active_and_the_wait_begins_anew() -> None:
    story = running()
    story.advance(60, calls=5)
    story.advance(80, calls=0)
    assert story.phase() is Phase.DRAINING
    assert story.scaler.activate(story.now) == Decision(1, Reason.ALREADY_ACTIVE)
    assert story.phase() is Phase.ACTIVE
    assert story.advance(59, calls=0) == Decision(1, Reason.STABLE_WINDOW)
    assert story.advance(30, calls=0) == Decision(1, Reason.GRACE_PERIOD)
    assert story.advance(2, calls=0) == Decision(0, Reason.NO_TRAFFIC)


def test_zero_to_one_needs_no_tick_and_however_many_wakes_there_are_one_starts() -> None:
    story = at_zero()
    assert story.scaler.activate(START_S + 0.5) == Decision(1, Reason.ACTIVATED)
    assert story.phase() is Phase.ACTIVATING
    for _ in range(100):
        assert story.scaler.activate(START_S + 0.6) == Decision(1, Reason.ALREADY_ACTIVE)
    assert story.scaler.desired == 1


def test_a_wake_starts_the_activation_scale() -> None:
    story = at_zero(activation_scale=3, max_scale=8)
    assert story.scaler.activate(START_S) == Decision(3, Reason.ACTIVATED)


def test_a_woken_function_without_further_calls_goes_back_to_zero_after_window_and_grace() -> None:
    story = at_zero(starts_in_s=4)
    story.apply(story.scaler.activate(START_S))
    assert story.advance(2, calls=0) == Decision(1, Reason.ACTIVATING)
    assert story.advance(2, calls=0) == Decision(1, Reason.STABLE_WINDOW)  # ready at 4 s
    assert story.advance(58, calls=0) == Decision(1, Reason.STABLE_WINDOW)
    assert story.advance(2, calls=0) == Decision(1, Reason.GRACE_PERIOD)
    assert story.advance(30, calls=0) == Decision(0, Reason.NO_TRAFFIC)


def test_a_burst_from_a_long_silence_counts_in_full() -> None:
    story = at_zero()
    story.advance(300, calls=0)  # a function at zero: not recorded
    story.scaler.activate(story.now)
    # 32 calls over the 2 s since the first write, not over 60: ceil(32 / 10) = 4.
    assert story.advance(2, calls=32).desired == 4


def test_a_slow_start_is_never_reaped_though_the_caller_has_gone() -> None:
    story = at_zero(starts_in_s=300)
    story.apply(story.scaler.activate(START_S))
    assert story.advance(298, calls=0) == Decision(1, Reason.ACTIVATING)
    assert story.advance(2, calls=0) == Decision(1, Reason.STABLE_WINDOW)


def test_a_start_that_never_ends_is_given_up_after_the_progress_deadline() -> None:
    story = at_zero(starts_in_s=10_000)
    story.apply(story.scaler.activate(START_S))
    assert story.advance(598, calls=0) == Decision(1, Reason.ACTIVATING)
    assert story.advance(2, calls=0) == Decision(0, Reason.TIMED_OUT)
    assert story.advance(2, calls=0) == Decision(0, Reason.NO_TRAFFIC)
    assert story.scaler.activate(story.now) == Decision(1, Reason.ACTIVATED)


def test_a_first_deployment_runs_its_initial_scale_until_it_was_ready() -> None:
    scaler = FunctionAutoscaler.for_new_function(scaling_settings(initial_scale=3), now=START_S)
    story = ScalingScenario(scaler, starts_in_s=20)
    assert story.advance(2, calls=None) == Decision(3, Reason.NO_DATA)
    assert story.advance(16, calls=0) == Decision(3, Reason.INITIAL_SCALE)
    assert story.advance(2, calls=0) == Decision(1, Reason.SCALE_DOWN_RATE)  # floor(3 / 2)
    assert story.advance(100, calls=0) == Decision(0, Reason.NO_TRAFFIC)


def test_an_initial_scale_of_zero_starts_nothing() -> None:
    scaler = FunctionAutoscaler.for_new_function(scaling_settings(initial_scale=0), now=START_S)
    assert (scaler.desired, scaler.phase) == (0, Phase.INACTIVE)
    assert ScalingScenario(scaler).advance(60, calls=0) == Decision(0, Reason.NO_TRAFFIC)


def test_a_first_deployment_that_never_gets_ready_is_given_up() -> None:
    story = ScalingScenario(
        FunctionAutoscaler.for_new_function(scaling_settings(), now=START_S), starts_in_s=10_000
    )
    assert story.advance(598, calls=0) == Decision(1, Reason.INITIAL_SCALE)
    assert story.advance(2, calls=0) == Decision(0, Reason.TIMED_OUT)


def test_a_burst_panics_holds_for_a_stable_window_and_halves_its_way_down() -> None:
    story = running()
    story.advance(120, calls=8)
    # 80 calls for 6 s. After 2 s the panic window holds (4 * 8 + 2 * 80) / 6 = 32: 4 replicas for
    # 1, panic. After 4 s 56: 6 for 4, no longer over. After 6 s 80: 8.
    assert story.advance(6, calls=80) == Decision(8, Reason.PANIC)
    assert story.scaler.is_panicking
    # Last over the threshold 2 s into the burst: held up to and with 62 s, freed at 64 s.
    assert story.advance(56, calls=8) == Decision(8, Reason.PANIC_HOLD)
    assert story.advance(2, calls=8) == Decision(4, Reason.SCALE_DOWN_RATE)
    story.advance(10, calls=8)
    down = [n for n in story.desired()[63:] if n < 8]
    assert down[:4] == [4, 2, 1, 1]  # at most half of the ready ones go at once


def test_a_control_plane_that_restarts_sheds_nothing_for_a_stable_window() -> None:
    story = running(replicas=6)
    assert story.advance(60, calls=10) == Decision(6, Reason.PANIC_HOLD)
    assert story.advance(2, calls=10) == Decision(3, Reason.SCALE_DOWN_RATE)


def test_a_control_plane_that_restarts_keeps_a_function_that_is_starting() -> None:
    scaler = FunctionAutoscaler.restored(scaling_settings(), replicas=1, ready=0, now=START_S)
    assert scaler.phase is Phase.ACTIVATING
    assert scaler.decide(START_S, ready=0) == Decision(1, Reason.NO_DATA)


def test_routers_that_fall_silent_change_nothing() -> None:
    story = running()
    story.advance(60, calls=35)
    assert story.ready == 4
    assert story.advance(59, calls=None).desired == 4
    assert story.advance(3600, calls=None) == Decision(4, Reason.NO_DATA)
    assert set(story.desired()[30:]) == {4}


def test_a_pinned_function_never_goes_to_zero() -> None:
    story = running(min_scale=1)
    assert story.advance(600, calls=0) == Decision(1, Reason.MIN_SCALE)
    assert story.phase() is Phase.ACTIVE


def test_with_scale_to_zero_disabled_one_replica_stays() -> None:
    story = running(enable_scale_to_zero=False)
    assert story.advance(600, calls=0) == Decision(1, Reason.SCALE_TO_ZERO_DISABLED)


def test_a_replica_lost_under_load_is_wanted_again_and_counts_as_activating() -> None:
    story = running()
    story.advance(60, calls=5)
    assert story.scaler.decide(story.now + 1, ready=0) == Decision(1, Reason.STABLE)
    assert story.phase() is Phase.ACTIVATING


def test_other_settings_take_effect_and_keep_the_history() -> None:
    story = running()
    story.advance(60, calls=20)
    assert story.ready == 2
    story.scaler.reconfigure(scaling_settings(target=5, window_s=30))
    assert story.scaler.settings.window_s == 30
    assert story.scaler.load(story.now) == LoadAverages(stable=20, panic=20)
    assert story.advance(2, calls=20) == Decision(4, Reason.STABLE)


def test_pinning_a_function_at_zero_starts_it() -> None:
    story = at_zero()
    story.scaler.reconfigure(scaling_settings(min_scale=2))
    assert story.advance(2, calls=None) == Decision(2, Reason.MIN_SCALE)
    assert story.phase() is Phase.ACTIVATING


def test_reports_of_several_routers_are_added() -> None:
    scaler = FunctionAutoscaler.restored(scaling_settings(), replicas=1, ready=1, now=0)
    for second in range(10):
        scaler.observe(second + 0.1, 4)
        scaler.observe(second + 0.7, 3)
    assert scaler.load(9.9) == LoadAverages(stable=7, panic=7)


def test_a_function_never_reported_has_no_data() -> None:
    scaler = FunctionAutoscaler.restored(scaling_settings(), replicas=1, ready=1, now=0)
    assert scaler.load(5) == NoData()


@pytest.mark.parametrize("concurrency", [-1, math.nan, math.inf])
def test_a_report_that_is_no_load_is_refused_and_changes_nothing(concurrency: float) -> None:
    scaler = FunctionAutoscaler.restored(scaling_settings(), replicas=1, ready=1, now=0)
    with pytest.raises(ScalingError, match="concurrency: got"):
        scaler.observe(1, concurrency)
    assert scaler.load(1) == NoData()


calls_st = st.one_of(st.none(), st.integers(0, 400))
acts = st.lists(st.tuples(st.integers(1, 40), calls_st, st.booleans()), max_size=12)
knobs_st = st.builds(
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


@given(knobs=knobs_st, acts=acts, starts_in_s=st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_whatever_happens_replicas_stay_within_bounds_and_zero_is_earned(
    knobs: ScalingSettings, acts: list[tuple[int, float | None, bool]], starts_in_s: int
) -> None:
    story = ScalingScenario(
        FunctionAutoscaler.for_new_function(knobs, now=START_S), starts_in_s=starts_in_s
    )
    for seconds, calls, wake in acts:
        if wake:
            wanted = max(1, story.scaler.desired)
            assert story.apply(story.scaler.activate(story.now)).desired == wanted
        story.advance(seconds, calls=calls)
    for decision in story.decisions[1:]:
        assert knobs.min_scale <= decision.desired <= knobs.max_scale
        if decision.desired == 0:
            assert knobs.enable_scale_to_zero
            assert decision.reason in {Reason.NO_TRAFFIC, Reason.TIMED_OUT}
    for before, after in pairwise(story.desired()):
        if after == 0 < before:
            assert before == 1


@given(
    history=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 300)), max_size=6),
    calls=st.integers(0, 300),
    knobs=knobs_st,
)
@settings(max_examples=60, deadline=None)
def test_constant_load_never_flaps(
    history: list[tuple[int, int]], calls: int, knobs: ScalingSettings
) -> None:
    story = ScalingScenario(FunctionAutoscaler.for_new_function(knobs, now=START_S))
    for seconds, earlier in history:
        story.advance(seconds, calls=earlier)
    # Old load leaves the windows, panic ends, the delay and the grace pass: then nothing moves.
    story.advance(240, calls=calls)
    settled = len(story.decisions)
    story.advance(120, calls=calls)
    floor = 0 if knobs.enable_scale_to_zero else 1
    wanted = max(floor, knobs.min_scale, min(knobs.max_scale, math.ceil(calls / 10)))
    assert set(story.desired()[settled:]) == {wanted}


@given(calls=st.integers(1, 300), knobs=knobs_st)
@settings(max_examples=60, deadline=None)
def test_constant_load_from_zero_goes_up_and_never_down(calls: int, knobs: ScalingSettings) -> None:
    story = ScalingScenario(FunctionAutoscaler.restored(knobs, replicas=0, ready=0, now=START_S))
    story.apply(story.scaler.activate(story.now))
    story.advance(200, calls=calls)
    assert story.desired() == sorted(story.desired())
