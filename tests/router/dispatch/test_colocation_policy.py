"""Colocation decisions from given times: paired trials of two passes, and the ranking."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_router.dispatch.colocation_policy import (
    MAX_COLOCATED_FUNCTIONS,
    MAX_COLOCATED_ROWS,
    MAX_MODEL_FUNCTIONS,
    MIN_GAIN,
    MIN_LEAD,
    MIN_TRIALS,
    PASSES_BETWEEN_FIRST_TRIALS,
    PASSES_BETWEEN_RANKINGS,
    PASSES_BETWEEN_TRIALS,
    ColocationPolicy,
    FunctionRanking,
    PairedTrials,
    colocation_choices,
)


@pytest.mark.parametrize(
    ("n_functions", "n_layers", "choices"),
    [
        (0, 0, (0,)),
        (1, 1, (0, 1)),
        (2, 40, (0, 1, 2)),
        (3, 85, (0, 1, 3)),
        (3, 86, (0, 1)),
        (4, 64, (0, 1, 2, 4)),
        (9, 24, (0, 1, 2, 4, 9)),
        (9, 60, (0, 1, 2, 4)),
    ],
)
def test_half_of_a_layers_functions_or_all_of_few_are_colocated(
    n_functions: int, n_layers: int, choices: tuple[int, ...]
) -> None:
    assert colocation_choices(n_functions, n_layers) == choices


@given(st.integers(0, 1000), st.integers(0, 100))
def test_choices_are_few_and_start_at_zero(n_functions: int, n_layers: int) -> None:
    *some, most = choices = colocation_choices(n_functions, n_layers)
    assert choices[0] == 0
    assert len(choices) <= 5
    assert sorted(set(choices)) == list(choices)
    assert all(2 * n <= n_functions and n <= MAX_COLOCATED_FUNCTIONS for n in some)
    assert 2 * most <= n_functions or n_functions * n_layers <= MAX_MODEL_FUNCTIONS


def run_passes(
    trials: PairedTrials, n_passes: int, time_of_choice_s: Callable[[int], float]
) -> list[int]:
    """Record passes, each with the time of its choice; return the choices."""
    choices_made = []
    for _ in range(n_passes):
        choices_made.append(trials.choice)
        trials.record_pass(time_of_choice_s(choices_made[-1]))
    return choices_made


def test_single_choice_is_always_used() -> None:
    assert run_passes(PairedTrials(1), 200, lambda _: 1.0) == [0] * 200


def test_trials_consist_of_consecutive_passes() -> None:
    first = run_passes(PairedTrials(3), 1 + 4 * MIN_TRIALS, lambda _: 1.0)
    assert first == [0, *[0, 1, 0, 2] * MIN_TRIALS]


def test_faster_choice_is_used_after_a_few_trials() -> None:
    trials = PairedTrials(2)
    early = run_passes(trials, 2 * MIN_TRIALS, lambda i: (1.0, 0.9)[i])
    assert early.count(1) < MIN_TRIALS
    later = run_passes(trials, 1 + PASSES_BETWEEN_TRIALS, lambda i: (1.0, 0.9)[i])
    assert later.count(1) >= PASSES_BETWEEN_TRIALS


def test_best_of_several_choices_is_used() -> None:
    times_s = (1.0, 0.95, 0.8, 0.9)
    trials = PairedTrials(4)
    run_passes(trials, 300, times_s.__getitem__)
    choices_made = run_passes(trials, 300, times_s.__getitem__)
    assert choices_made.count(2) > 0.9 * 300


@pytest.mark.parametrize("gain", [0.0, MIN_GAIN * 0.9, -0.5])
def test_choice_is_kept_for_too_little_gain(gain: float) -> None:
    trials = PairedTrials(2)
    choices_made = run_passes(trials, 500, lambda i: (1.0, 1.0 - gain)[i])
    assert choices_made.count(1) <= MIN_TRIALS + 500 // PASSES_BETWEEN_TRIALS


def test_choice_that_no_longer_pays_is_dropped() -> None:
    trials = PairedTrials(2)
    run_passes(trials, 100, lambda i: (1.0, 0.8)[i])
    assert trials.choice == 1
    run_passes(trials, 10 * PASSES_BETWEEN_TRIALS, lambda i: (1.0, 1.3)[i])
    choices_made = run_passes(trials, PASSES_BETWEEN_TRIALS, lambda i: (1.0, 1.3)[i])
    assert choices_made.count(0) >= PASSES_BETWEEN_TRIALS - 2


def test_slowdown_of_the_machine_decides_no_trial() -> None:
    """Times grow by half during the run, but ratios of consecutive passes do not."""
    trials, passes = PairedTrials(2), iter(range(10_000))
    choices_made = run_passes(trials, 600, lambda i: (1.0, 0.9)[i] * (1 + next(passes) / 1200))
    assert choices_made[2 * MIN_TRIALS + 1 :].count(1) > 0.9 * (600 - 2 * MIN_TRIALS - 1)


def test_outliers_decide_no_trial() -> None:
    trials, n = PairedTrials(2), iter(range(10_000))
    choices_made = run_passes(trials, 600, lambda i: 0.1 if i and next(n) % 7 == 0 else 1.0)
    assert choices_made.count(1) < 60


def test_each_batch_size_is_decided_by_its_own_times() -> None:
    policy = ColocationPolicy(3, 1)
    for _ in range(200):
        policy.record_pass(1, {0: 1.0, 1: 0.8, 3: 0.9}[policy.n_colocated(1)])
        policy.record_pass(20, {0: 1.0, 1: 1.2, 3: 1.2}[policy.n_colocated(20)])
    assert [policy.n_colocated(1) for _ in range(3)] == [1, 1, 1]
    choices_made = []
    for _ in range(PASSES_BETWEEN_TRIALS):
        choices_made.append(policy.n_colocated(20))
        policy.record_pass(20, {0: 1.0, 1: 1.2, 3: 1.2}[choices_made[-1]])
    assert choices_made.count(0) >= PASSES_BETWEEN_TRIALS - 1


def test_batch_size_without_trials_uses_what_pays_for_the_nearest() -> None:
    policy = ColocationPolicy(3, 1)
    policy.record_pass(20, 1.0)  # before any is decided
    for _ in range(100):
        policy.record_pass(1, {0: 1.0, 1: 0.8, 3: 0.7}[policy.n_colocated(1)])
        policy.record_pass(60, {0: 1.0, 1: 0.8, 3: 1.2}[policy.n_colocated(60)])
    assert (policy.n_colocated(1), policy.n_colocated(60)) == (3, 1)
    assert policy.n_colocated(20) == 1
    assert policy.n_colocated(3) == 3


def test_assumed_choice_is_used_between_its_first_trials_and_dropped_if_it_does_not_pay() -> None:
    trials = PairedTrials(2)
    trials.assume(1)
    n_first = MIN_TRIALS * (2 + PASSES_BETWEEN_FIRST_TRIALS)
    first = run_passes(trials, n_first, (1.0, 1.1).__getitem__)
    assert first == [*[1] * PASSES_BETWEEN_FIRST_TRIALS, 0, 1] * MIN_TRIALS
    assert trials.is_decided
    assert trials.best == 0
    kept = PairedTrials(2)
    kept.assume(1)
    run_passes(kept, n_first, (1.0, 0.9).__getitem__)
    assert kept.is_decided
    assert kept.best == 1


def test_large_batches_are_never_colocated() -> None:
    policy = ColocationPolicy(4, 1)
    for _ in range(300):
        assert policy.n_colocated(MAX_COLOCATED_ROWS + 1) == 0
        policy.record_pass(MAX_COLOCATED_ROWS + 1, 1.0)


def record_until_ranked(ranking: FunctionRanking, *pairs: int) -> None:
    """Record these pairs of a layer's functions in each pass, until they are ranked."""
    for _ in range(PASSES_BETWEEN_RANKINGS):
        for function, n in enumerate(pairs):
            ranking.record_pairs(0, function, n)
        ranking.finish_pass()


def test_hottest_functions_are_those_with_most_pairs() -> None:
    ranking = FunctionRanking([4], n_hot=1)
    record_until_ranked(ranking, 1, 5, 3, 0)
    record_until_ranked(ranking, 1, 5, 3, 0)
    assert ranking.hottest(0, 2, range(4)) == (1, 2)
    assert ranking.hottest(0, 2, {0, 2, 3}) == (2, 0)
    assert ranking.hottest(0, 0, range(4)) == ()


def test_hot_function_is_replaced_only_by_a_clear_leader() -> None:
    ranking = FunctionRanking([3], n_hot=1)
    record_until_ranked(ranking, 0, 100, 0)
    for _ in range(5):
        record_until_ranked(ranking, 0, 100, int(100 * MIN_LEAD) - 5)
    assert ranking.hottest(0, 1, range(3)) == (1,)
    for _ in range(10):
        record_until_ranked(ranking, 0, 100, int(100 * MIN_LEAD) + 50)
    assert ranking.hottest(0, 1, range(3)) == (2,)


def test_finish_pass_reports_when_it_ranked() -> None:
    ranking = FunctionRanking([2], n_hot=1)
    has_ranked = [ranking.finish_pass() for _ in range(2 * PASSES_BETWEEN_RANKINGS + 1)]
    assert [i for i, ranks in enumerate(has_ranked) if ranks] == [
        0,
        PASSES_BETWEEN_RANKINGS,
        2 * PASSES_BETWEEN_RANKINGS,
    ]
