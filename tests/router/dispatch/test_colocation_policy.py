"""Where experts are computed follows from times that are told: duels of two passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_router.dispatch.colocation import (
    MAX_COLOCATED_ROWS,
    MIN_GAIN,
    MIN_LEAD,
    MIN_TRIALS,
    PASSES_BETWEEN_RANKINGS,
    PASSES_BETWEEN_TRIALS,
    ColocationPolicy,
    FunctionRanking,
    PairedTrials,
    colocation_choices,
)


@pytest.mark.parametrize(
    ("n_functions", "choices"),
    [(0, (0,)), (1, (0,)), (2, (0, 1)), (3, (0, 1)), (4, (0, 1, 2)), (9, (0, 1, 2, 4))],
)
def test_at_most_half_of_a_layers_functions_may_be_here(
    n_functions: int, choices: tuple[int, ...]
) -> None:
    assert colocation_choices(n_functions) == choices


@given(st.integers(0, 1000))
def test_choices_are_few_and_none_is_one_of_them(n_functions: int) -> None:
    choices = colocation_choices(n_functions)
    assert choices[0] == 0
    assert len(choices) <= 4
    assert 2 * choices[-1] <= n_functions


def run_passes(duels: PairedTrials, n_passes: int, took_s: Callable[[int], float]) -> list[int]:
    """Do passes, each of which takes what its choice takes; return the choices."""
    made = []
    for _ in range(n_passes):
        made.append(duels.choice)
        duels.record_pass(took_s(made[-1]))
    return made


def test_one_choice_is_taken_always() -> None:
    assert run_passes(PairedTrials(1), 200, lambda _: 1.0) == [0] * 200


def test_duels_are_of_passes_that_follow_each_other() -> None:
    first = run_passes(PairedTrials(3), 1 + 4 * MIN_TRIALS, lambda _: 1.0)
    assert first == [0, *[0, 1, 0, 2] * MIN_TRIALS]


def test_what_takes_less_time_is_taken_after_a_few_duels() -> None:
    duels = PairedTrials(2)
    early = run_passes(duels, 2 * MIN_TRIALS, lambda i: (1.0, 0.9)[i])
    assert early.count(1) < MIN_TRIALS
    later = run_passes(duels, 1 + PASSES_BETWEEN_TRIALS, lambda i: (1.0, 0.9)[i])
    assert later.count(1) >= PASSES_BETWEEN_TRIALS


def test_the_best_of_several_is_taken() -> None:
    times_s = (1.0, 0.95, 0.8, 0.9)
    duels = PairedTrials(4)
    run_passes(duels, 300, times_s.__getitem__)
    made = run_passes(duels, 300, times_s.__getitem__)
    assert made.count(2) > 0.9 * 300


@pytest.mark.parametrize("gain", [0.0, MIN_GAIN * 0.9, -0.5])
def test_nothing_is_moved_for_too_little(gain: float) -> None:
    duels = PairedTrials(2)
    made = run_passes(duels, 500, lambda i: (1.0, 1.0 - gain)[i])
    assert made.count(1) <= MIN_TRIALS + 500 // PASSES_BETWEEN_TRIALS


def test_what_no_longer_pays_is_given_up() -> None:
    duels = PairedTrials(2)
    run_passes(duels, 100, lambda i: (1.0, 0.8)[i])
    assert duels.choice == 1
    run_passes(duels, 10 * PASSES_BETWEEN_TRIALS, lambda i: (1.0, 1.3)[i])
    made = run_passes(duels, PASSES_BETWEEN_TRIALS, lambda i: (1.0, 1.3)[i])
    assert made.count(0) >= PASSES_BETWEEN_TRIALS - 2


def test_a_machine_that_slows_down_decides_no_duel() -> None:
    """Times grow by half during the run: ratios of neighbours do not."""
    duels, pace = PairedTrials(2), iter(range(10_000))
    made = run_passes(duels, 600, lambda i: (1.0, 0.9)[i] * (1 + next(pace) / 1200))
    assert made[2 * MIN_TRIALS + 1 :].count(1) > 0.9 * (600 - 2 * MIN_TRIALS - 1)


def test_one_outlier_decides_no_duel() -> None:
    duels, n = PairedTrials(2), iter(range(10_000))
    made = run_passes(duels, 600, lambda i: 0.1 if i and next(n) % 7 == 0 else 1.0)
    assert made.count(1) < 60


def test_each_size_of_batch_is_decided_by_its_own_times() -> None:
    placement = ColocationPolicy(3)
    for _ in range(200):
        placement.record_pass(1, (1.0, 0.8)[placement.n_colocated(1)])
        placement.record_pass(20, (1.0, 1.2)[placement.n_colocated(20)])
    assert [placement.n_colocated(1) for _ in range(3)] == [1, 1, 1]
    taken = []
    for _ in range(PASSES_BETWEEN_TRIALS):
        taken.append(placement.n_colocated(20))
        placement.record_pass(20, (1.0, 1.2)[taken[-1]])
    assert taken.count(0) >= PASSES_BETWEEN_TRIALS - 1


def test_large_batches_are_never_computed_here() -> None:
    placement = ColocationPolicy(4)
    for _ in range(300):
        assert placement.n_colocated(MAX_COLOCATED_ROWS + 1) == 0
        placement.record_pass(MAX_COLOCATED_ROWS + 1, 1.0)


def record_until_ranked(popularity: FunctionRanking, *pairs: int) -> None:
    """Let the functions of a layer be asked for so much in each pass, until they are ranked."""
    for _ in range(PASSES_BETWEEN_RANKINGS):
        for function, n in enumerate(pairs):
            popularity.record_pairs(0, function, n)
        popularity.finish_pass()


def test_the_hottest_are_those_with_most_pairs() -> None:
    popularity = FunctionRanking([4], n_hot=1)
    record_until_ranked(popularity, 1, 5, 3, 0)
    record_until_ranked(popularity, 1, 5, 3, 0)
    assert popularity.hottest(0, 2, range(4)) == (1, 2)
    assert popularity.hottest(0, 2, {0, 2, 3}) == (2, 0)
    assert popularity.hottest(0, 0, range(4)) == ()


def test_a_hot_function_gives_way_to_one_that_leads_clearly() -> None:
    popularity = FunctionRanking([3], n_hot=1)
    record_until_ranked(popularity, 0, 100, 0)
    for _ in range(5):
        record_until_ranked(popularity, 0, 100, int(100 * MIN_LEAD) - 5)
    assert popularity.hottest(0, 1, range(3)) == (1,)
    for _ in range(10):
        record_until_ranked(popularity, 0, 100, int(100 * MIN_LEAD) + 50)
    assert popularity.hottest(0, 1, range(3)) == (2,)


def test_ranking_is_told_when_it_happens_and_only_then() -> None:
    popularity = FunctionRanking([2], n_hot=1)
    told = [popularity.finish_pass() for _ in range(2 * PASSES_BETWEEN_RANKINGS + 1)]
    assert [i for i, ranks in enumerate(told) if ranks] == [
        0,
        PASSES_BETWEEN_RANKINGS,
        2 * PASSES_BETWEEN_RANKINGS,
    ]
