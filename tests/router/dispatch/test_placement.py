"""Where experts are computed follows from times that are told: duels of two passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_router.dispatch.placement import (
    DUELS,
    LEAST_GAIN,
    LEAST_LEAD,
    MAX_ROWS,
    PASSES_BETWEEN_DUELS,
    PASSES_BETWEEN_RANKINGS,
    Duels,
    Placement,
    Popularity,
    choices_of,
)


@pytest.mark.parametrize(
    ("n_functions", "choices"),
    [(0, (0,)), (1, (0,)), (2, (0, 1)), (3, (0, 1)), (4, (0, 1, 2)), (9, (0, 1, 2, 4))],
)
def test_at_most_half_of_a_layers_functions_may_be_here(
    n_functions: int, choices: tuple[int, ...]
) -> None:
    assert choices_of(n_functions) == choices


@given(st.integers(0, 1000))
def test_choices_are_few_and_none_is_one_of_them(n_functions: int) -> None:
    choices = choices_of(n_functions)
    assert choices[0] == 0
    assert len(choices) <= 4
    assert 2 * choices[-1] <= n_functions


def play(duels: Duels, n_passes: int, took_s: Callable[[int], float]) -> list[int]:
    """Do passes, each of which takes what its choice takes; return the choices."""
    made = []
    for _ in range(n_passes):
        made.append(duels.choice)
        duels.add(took_s(made[-1]))
    return made


def test_one_choice_is_taken_always() -> None:
    assert play(Duels(1), 200, lambda _: 1.0) == [0] * 200


def test_duels_are_of_passes_that_follow_each_other() -> None:
    first = play(Duels(3), 1 + 4 * DUELS, lambda _: 1.0)
    assert first == [0, *[0, 1, 0, 2] * DUELS]


def test_what_takes_less_time_is_taken_after_a_few_duels() -> None:
    duels = Duels(2)
    early = play(duels, 2 * DUELS, lambda i: (1.0, 0.9)[i])
    assert early.count(1) < DUELS
    later = play(duels, 1 + PASSES_BETWEEN_DUELS, lambda i: (1.0, 0.9)[i])
    assert later.count(1) >= PASSES_BETWEEN_DUELS


def test_the_best_of_several_is_taken() -> None:
    times_s = (1.0, 0.95, 0.8, 0.9)
    duels = Duels(4)
    play(duels, 300, times_s.__getitem__)
    made = play(duels, 300, times_s.__getitem__)
    assert made.count(2) > 0.9 * 300


@pytest.mark.parametrize("gain", [0.0, LEAST_GAIN * 0.9, -0.5])
def test_nothing_is_moved_for_too_little(gain: float) -> None:
    duels = Duels(2)
    made = play(duels, 500, lambda i: (1.0, 1.0 - gain)[i])
    assert made.count(1) <= DUELS + 500 // PASSES_BETWEEN_DUELS


def test_what_no_longer_pays_is_given_up() -> None:
    duels = Duels(2)
    play(duels, 100, lambda i: (1.0, 0.8)[i])
    assert duels.choice == 1
    play(duels, 10 * PASSES_BETWEEN_DUELS, lambda i: (1.0, 1.3)[i])
    made = play(duels, PASSES_BETWEEN_DUELS, lambda i: (1.0, 1.3)[i])
    assert made.count(0) >= PASSES_BETWEEN_DUELS - 2


def test_a_machine_that_slows_down_decides_no_duel() -> None:
    """Times grow by half during the run: ratios of neighbours do not."""
    duels, pace = Duels(2), iter(range(10_000))
    made = play(duels, 600, lambda i: (1.0, 0.9)[i] * (1 + next(pace) / 1200))
    assert made[2 * DUELS + 1 :].count(1) > 0.9 * (600 - 2 * DUELS - 1)


def test_one_outlier_decides_no_duel() -> None:
    duels, n = Duels(2), iter(range(10_000))
    made = play(duels, 600, lambda i: 0.1 if i and next(n) % 7 == 0 else 1.0)
    assert made.count(1) < 60


def test_each_size_of_batch_is_decided_by_its_own_times() -> None:
    placement = Placement(3)
    for _ in range(200):
        placement.add(1, (1.0, 0.8)[placement.here(1)])
        placement.add(20, (1.0, 1.2)[placement.here(20)])
    assert [placement.here(1) for _ in range(3)] == [1, 1, 1]
    taken = []
    for _ in range(PASSES_BETWEEN_DUELS):
        taken.append(placement.here(20))
        placement.add(20, (1.0, 1.2)[taken[-1]])
    assert taken.count(0) >= PASSES_BETWEEN_DUELS - 1


def test_large_batches_are_never_computed_here() -> None:
    placement = Placement(4)
    for _ in range(300):
        assert placement.here(MAX_ROWS + 1) == 0
        placement.add(MAX_ROWS + 1, 1.0)


def ranked(popularity: Popularity, *pairs: int) -> None:
    """Let the functions of a layer be asked for so much in each pass, until they are ranked."""
    for _ in range(PASSES_BETWEEN_RANKINGS):
        for function, n in enumerate(pairs):
            popularity.add(0, function, n)
        popularity.end_pass()


def test_the_hottest_are_those_with_most_pairs() -> None:
    popularity = Popularity([4], n_hot=1)
    ranked(popularity, 1, 5, 3, 0)
    ranked(popularity, 1, 5, 3, 0)
    assert popularity.hottest(0, 2, range(4)) == (1, 2)
    assert popularity.hottest(0, 2, {0, 2, 3}) == (2, 0)
    assert popularity.hottest(0, 0, range(4)) == ()


def test_a_hot_function_gives_way_to_one_that_leads_clearly() -> None:
    popularity = Popularity([3], n_hot=1)
    ranked(popularity, 0, 100, 0)
    for _ in range(5):
        ranked(popularity, 0, 100, int(100 * LEAST_LEAD) - 5)
    assert popularity.hottest(0, 1, range(3)) == (1,)
    for _ in range(10):
        ranked(popularity, 0, 100, int(100 * LEAST_LEAD) + 50)
    assert popularity.hottest(0, 1, range(3)) == (2,)


def test_ranking_is_told_when_it_happens_and_only_then() -> None:
    popularity = Popularity([2], n_hot=1)
    told = [popularity.end_pass() for _ in range(2 * PASSES_BETWEEN_RANKINGS + 1)]
    assert [i for i, ranks in enumerate(told) if ranks] == [
        0,
        PASSES_BETWEEN_RANKINGS,
        2 * PASSES_BETWEEN_RANKINGS,
    ]
