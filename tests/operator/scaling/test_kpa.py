"""Decisions checked by hand; by default one replica takes 10 calls (target 10 at 100 %)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_operator.scaling.decision import Decision, Reason
from faasmoe_operator.scaling.kpa import KpaState, ScalingObservation, decide
from faasmoe_operator.scaling.settings import ScalingSettings
from faasmoe_operator.scaling.windows import LoadAverages, NoData

BASE: dict[str, Any] = {"target": 10.0, "target_utilization_percentage": 100.0}


def decide_once(
    load: LoadAverages | NoData,
    *,
    ready: int,
    state: KpaState | None = None,
    now: float = 1000.0,
    desired: int | None = None,
    **settings: Any,
) -> tuple[Decision, KpaState]:
    return decide(
        ScalingSettings(**{**BASE, **settings}),
        state or KpaState(),
        observation=ScalingObservation(
            load, ready=ready, desired=ready if desired is None else desired
        ),
        now=now,
    )


CASES = [
    # ceil(10 / 10) = 1
    pytest.param(10, 10, 1, {}, Decision(1, Reason.STABLE), id="exactly-one-replica"),
    # ceil(10.1 / 10) = 2; panic 2 / 1 = 2 >= 2: panics, and panic = stable
    pytest.param(10.1, 10.1, 1, {}, Decision(2, Reason.STABLE), id="just-over-one-replica"),
    # stable ceil(30 / 10) = 3; panic ceil(50 / 10) = 5 < 2 * 3
    pytest.param(30, 50, 3, {}, Decision(3, Reason.STABLE), id="burst-under-the-threshold"),
    # stable 3; panic ceil(60 / 10) = 6, 6 / 3 = 2 >= 2: max(3, 6)
    pytest.param(30, 60, 3, {}, Decision(6, Reason.PANIC), id="burst-at-the-threshold"),
    # threshold 3: 6 / 3 = 2 < 3
    pytest.param(
        30,
        60,
        3,
        {"panic_threshold_percentage": 300},
        Decision(3, Reason.STABLE),
        id="higher-threshold",
    ),
    # in panic the larger recommendation applies: stable 8, panic 6 of 3
    pytest.param(80, 60, 3, {}, Decision(8, Reason.STABLE), id="stable-above-panic-in-panic"),
    # ready 0 counts as 1: stable 1, panic ceil(15 / 10) = 2, 2 / 1 >= 2
    pytest.param(5, 15, 0, {}, Decision(2, Reason.PANIC), id="no-replica-counts-as-one"),
    # stable ceil(10 / 10) = 1, but at least floor(9 / 2) = 4
    pytest.param(10, 10, 9, {}, Decision(4, Reason.SCALE_DOWN_RATE), id="down-rate"),
    # floor(9 / 10) = 0: no limit
    pytest.param(
        10, 10, 9, {"max_scale_down_rate": 10}, Decision(1, Reason.STABLE), id="high-down-rate"
    ),
    # floor(1 / 2) = 0: the last one may be removed
    pytest.param(0, 0, 1, {}, Decision(0, Reason.STABLE), id="to-zero-from-one"),
    # floor(2 / 2) = 1: never from two to zero
    pytest.param(0, 0, 2, {}, Decision(1, Reason.SCALE_DOWN_RATE), id="not-to-zero-from-two"),
    # both recommend 10; at most ceil(1.5 * 3) = 5; panics as 10 / 3 >= 2 before the rate, panic 5
    pytest.param(
        100, 100, 3, {"max_scale_up_rate": 1.5}, Decision(5, Reason.SCALE_UP_RATE), id="up-rate"
    ),
    # Knative's own example: rate 1.1 on 2 is 2.2, rounded up so that 3 can be reached
    pytest.param(
        30, 30, 2, {"max_scale_up_rate": 1.1}, Decision(3, Reason.STABLE), id="up-rate-rounds-up"
    ),
    # 1 recommended, raised to 4
    pytest.param(
        5, 5, 1, {"activation_scale": 4}, Decision(4, Reason.ACTIVATION_SCALE), id="activation"
    ),
    # 0 recommended: not raised
    pytest.param(0, 0, 1, {"activation_scale": 4}, Decision(0, Reason.STABLE), id="no-activation"),
    # 5 recommended: above the activation scale
    pytest.param(
        50, 50, 4, {"activation_scale": 4}, Decision(5, Reason.STABLE), id="above-activation"
    ),
    # 6 recommended, at most 4
    pytest.param(60, 60, 4, {"max_scale": 4}, Decision(4, Reason.MAX_SCALE), id="max-scale"),
    # 0 recommended, at least 1
    pytest.param(0, 0, 1, {"min_scale": 1}, Decision(1, Reason.MIN_SCALE), id="min-scale"),
    # 4 at 70 %: 2.8 per replica; 8.4 / 2.8 = 3, although floats yield 3.0000000000000004
    pytest.param(
        8.4,
        8.4,
        2,
        {"target": 4, "target_utilization_percentage": 70},
        Decision(3, Reason.STABLE),
        id="no-rounding-error",
    ),
    # a millionth of a call is not zero and needs a replica
    pytest.param(1e-6, 0, 1, {"target": 10_000}, Decision(1, Reason.STABLE), id="hardly-any-load"),
]


@pytest.mark.parametrize(("stable", "panic", "ready", "settings", "expected"), CASES)
def test_decision(
    stable: float, panic: float, ready: int, settings: dict[str, Any], expected: Decision
) -> None:
    assert decide_once(LoadAverages(stable, panic), ready=ready, **settings)[0] == expected


def test_keeps_the_last_decision_without_data() -> None:
    state = KpaState(panic_since=3, panic_replicas=5)
    assert decide_once(NoData(), ready=0, desired=3, state=state) == (
        Decision(3, Reason.NO_DATA),
        state,
    )


@pytest.mark.parametrize(
    ("desired", "expected"),
    [(9, Decision(4, Reason.MAX_SCALE)), (1, Decision(2, Reason.MIN_SCALE))],
)
def test_applies_bounds_without_data(desired: int, expected: Decision) -> None:
    assert decide_once(NoData(), ready=1, desired=desired, min_scale=2, max_scale=4)[0] == expected


def test_panic_never_scales_down() -> None:
    first, state = decide_once(LoadAverages(30, 60), ready=3, now=1000)
    assert (first, state.panic_since) == (Decision(6, Reason.PANIC), 1000)
    # The burst is over: 6 ready, stable 3, panic 3 of 6.
    second, state = decide_once(LoadAverages(30, 30), ready=6, state=state, now=1010)
    assert (second, state.panic_since) == (Decision(6, Reason.PANIC_HOLD), 1000)


def test_panic_continues_to_scale_up() -> None:
    _, state = decide_once(LoadAverages(30, 60), ready=3, now=1000)
    # 9 of 6 is below the threshold, but the panic has not ended.
    decision, state = decide_once(LoadAverages(30, 90), ready=6, state=state, now=1002)
    assert (decision, state.panic_replicas) == (Decision(9, Reason.PANIC), 9)


def test_panic_ends_a_stable_window_after_the_threshold_was_last_reached() -> None:
    _, state = decide_once(LoadAverages(30, 60), ready=3, now=1000)
    # Still over the threshold: panic lasts 60 s from here.
    _, state = decide_once(LoadAverages(30, 60), ready=3, state=state, now=1010)
    in_panic, state = decide_once(LoadAverages(30, 30), ready=6, state=state, now=1070)
    assert in_panic == Decision(6, Reason.PANIC_HOLD)  # 1010 + 60 is not before 1070
    after_panic, state = decide_once(LoadAverages(30, 30), ready=6, state=state, now=1070.1)
    assert after_panic == Decision(3, Reason.STABLE)
    assert state == KpaState()


def test_panic_threshold_applies_before_the_rates() -> None:
    # 10 / 3 >= 2 although the rate limits the 10 to ceil(1.1 * 3) = 4.
    _, state = decide_once(LoadAverages(30, 100), ready=3, max_scale_up_rate=1.1)
    assert (state.is_panicking, state.panic_replicas) == (True, 4)


def test_bounds_do_not_limit_panic_replicas() -> None:
    decision, state = decide_once(LoadAverages(30, 60), ready=3, max_scale=4)
    assert (decision.desired, state.panic_replicas) == (4, 6)


def test_restart_keeps_the_current_scale_for_a_stable_window() -> None:
    state = KpaState.restored(5, now=1000)
    # One second after the history was lost: 1 recommended, at least floor(5 / 2), but 5 stay.
    decision, state = decide_once(LoadAverages(10, 10), ready=5, state=state, now=1001)
    assert decision == Decision(5, Reason.PANIC_HOLD)
    decision, _ = decide_once(LoadAverages(10, 10), ready=5, state=state, now=1060.1)
    assert decision == Decision(2, Reason.SCALE_DOWN_RATE)


@pytest.mark.parametrize("replicas", [0, 1])
def test_restart_with_at_most_one_replica_does_not_panic(replicas: int) -> None:
    assert KpaState.restored(replicas, now=1000) == KpaState()


def test_lower_recommendation_applies_after_the_delay() -> None:
    def step(calls: float, ready: int, now: float, state: KpaState) -> tuple[Decision, KpaState]:
        load = LoadAverages(calls, 0)
        return decide_once(load, ready=ready, state=state, now=now, scale_down_delay_s=30)

    decision, state = step(40, 4, 1000, KpaState())
    assert decision == Decision(4, Reason.STABLE)
    decision, state = step(30, 4, 1010, state)
    assert decision == Decision(4, Reason.SCALE_DOWN_DELAY)
    decision, state = step(20, 4, 1020, state)
    assert decision == Decision(4, Reason.SCALE_DOWN_DELAY)
    # The recommendation of 4 expires after 30 s; that of 3 is 20 s old.
    decision, state = step(20, 4, 1030, state)
    assert decision == Decision(3, Reason.SCALE_DOWN_DELAY)
    decision, state = step(20, 3, 1040, state)
    assert decision == Decision(2, Reason.STABLE)


def test_scale_down_delay_does_not_delay_scale_up() -> None:
    _, state = decide_once(LoadAverages(40, 0), ready=4, now=1000, scale_down_delay_s=30)
    decision, state = decide_once(
        LoadAverages(70, 0), ready=4, state=state, now=1002, scale_down_delay_s=30
    )
    assert decision == Decision(7, Reason.STABLE)
    assert len(state.recommendations) == 1  # the older one is lower and can never apply again


def test_recommendations_are_dropped_when_the_delay_is_disabled() -> None:
    _, state = decide_once(LoadAverages(40, 0), ready=4, scale_down_delay_s=30)
    assert decide_once(LoadAverages(20, 0), ready=4, state=state)[0] == Decision(2, Reason.STABLE)


loads = st.floats(0, 5000).map(lambda value: round(value, 6))
settings_st = st.builds(
    lambda low, span, **other: ScalingSettings(
        min_scale=low, max_scale=max(low + span, 1), initial_scale=0, **other
    ),
    st.integers(0, 5),
    st.integers(0, 60),
    target=st.floats(0.5, 200),
    target_utilization_percentage=st.floats(1, 100),
    panic_threshold_percentage=st.floats(110, 1000),
    max_scale_up_rate=st.floats(1.01, 1000),
    max_scale_down_rate=st.floats(1.01, 10),
    scale_down_delay_s=st.sampled_from([0.0, 7.0, 30.0]),
)
states = st.one_of(
    st.just(KpaState()),
    st.builds(KpaState, panic_since=st.floats(900, 1000), panic_replicas=st.integers(0, 80)),
    st.builds(
        KpaState, recommendations=st.tuples(st.tuples(st.floats(960, 999), st.integers(0, 80)))
    ),
)


@given(
    settings=settings_st,
    state=states,
    load=st.builds(LoadAverages, loads, loads),
    ready=st.integers(0, 60),
)
def test_decision_is_within_min_and_max_scale(
    settings: ScalingSettings, state: KpaState, load: LoadAverages, ready: int
) -> None:
    observation = ScalingObservation(load, ready=ready, desired=ready)
    decision, _ = decide(settings, state, observation=observation, now=1000)
    assert settings.min_scale <= decision.desired <= settings.max_scale


@given(
    settings=settings_st,
    state=states,
    load=st.builds(LoadAverages, loads, loads),
    more=st.tuples(loads, loads),
    ready=st.integers(0, 60),
)
def test_decision_is_monotone_in_load(
    settings: ScalingSettings,
    state: KpaState,
    load: LoadAverages,
    more: tuple[float, float],
    ready: int,
) -> None:
    higher = LoadAverages(load.stable + more[0], load.panic + more[1])
    low, after_low = decide(
        settings, state, observation=ScalingObservation(load, ready=ready, desired=ready), now=1000
    )
    high, after_high = decide(
        settings,
        state,
        observation=ScalingObservation(higher, ready=ready, desired=ready),
        now=1000,
    )
    assert low.desired <= high.desired
    assert after_low.panic_replicas <= after_high.panic_replicas


@given(settings=settings_st, load=st.builds(LoadAverages, loads, loads), ready=st.integers(0, 60))
def test_panic_replicas_never_decrease(
    settings: ScalingSettings, load: LoadAverages, ready: int
) -> None:
    state = KpaState(panic_since=999, panic_replicas=10)
    observation = ScalingObservation(load, ready=ready, desired=ready)
    _, state = decide(settings, state, observation=observation, now=1000)
    assert state.panic_replicas >= 10
