"""Which number of threads is chosen, given how long passes take with each."""

from collections.abc import Callable

import pytest

from faasmoe_router.vllm_backend.thread_choice import (
    MAX_PASSES_BETWEEN_TRIALS,
    MAX_ROWS,
    N_RUNS,
    RUN_PASSES,
    ThreadChoice,
    thread_numbers,
)

SHORT: Callable[[int], float] = lambda n: 1.0 + 0.2 * n  # noqa: E731
LONG: Callable[[int], float] = lambda n: 1.0 / n  # noqa: E731
TRIAL_PASSES = RUN_PASSES * N_RUNS * 2


def run(
    choice: ThreadChoice, n_passes: int, time_of: Callable[[int], float], n_rows: int = 1
) -> list[int]:
    chosen = []
    for _ in range(n_passes):
        chosen.append(choice.choose(n_rows))
        choice.record(n_rows, time_of(chosen[-1]))
    return chosen


@pytest.mark.parametrize(("n", "expected"), [(1, (1,)), (2, (1, 2)), (3, (1, 3)), (16, (1, 8, 16))])
def test_one_half_and_all_threads_are_tried(n: int, expected: tuple[int, ...]) -> None:
    assert thread_numbers(n) == expected


@pytest.mark.parametrize(("time_of", "expected"), [(SHORT, 1), (LONG, 2)])
def test_the_fastest_number_is_used_after_a_trial(
    time_of: Callable[[int], float], expected: int
) -> None:
    choice = ThreadChoice(2)
    tried = run(choice, TRIAL_PASSES, time_of)
    assert sorted(tried) == [1] * (TRIAL_PASSES // 2) + [2] * (TRIAL_PASSES // 2)
    assert set(run(choice, 60, time_of)) == {expected}


def test_a_changed_number_is_told_once() -> None:
    choice = ThreadChoice(2)
    told = []
    for _ in range(2 * TRIAL_PASSES):
        told.append(choice.record(1, SHORT(choice.choose(1))))
    assert [number for number in told if number is not None] == [1]


def test_passes_of_a_trial_change_their_number_only_between_runs() -> None:
    tried = run(ThreadChoice(2), TRIAL_PASSES, SHORT)
    changes = [i for i in range(1, TRIAL_PASSES) if tried[i] != tried[i - 1]]
    assert all(i % RUN_PASSES == 0 for i in changes)


def test_another_number_must_be_faster_by_more_than_noise() -> None:
    choice = ThreadChoice(2)
    run(choice, TRIAL_PASSES, lambda n: 0.99 if n == 1 else 1.0)
    assert choice.choose(1) == 2


def test_what_has_become_faster_is_found_by_a_later_trial() -> None:
    choice = ThreadChoice(2)
    run(choice, TRIAL_PASSES, SHORT)
    run(choice, 2 * MAX_PASSES_BETWEEN_TRIALS, LONG)
    assert set(run(choice, 20, LONG)) == {2}


def test_trials_become_rare() -> None:
    choice = ThreadChoice(2)
    run(choice, 4 * MAX_PASSES_BETWEEN_TRIALS, SHORT)
    chosen = run(choice, 4 * MAX_PASSES_BETWEEN_TRIALS, SHORT)
    assert chosen.count(2) <= 4 * TRIAL_PASSES // 2


def test_each_size_has_a_choice_of_its_own_and_begins_with_its_neighbours() -> None:
    choice = ThreadChoice(2)
    run(choice, TRIAL_PASSES, SHORT, n_rows=1)
    run(choice, TRIAL_PASSES, LONG, n_rows=32)
    assert (choice.choose(1), choice.choose(32)) == (1, 2)
    run(choice, TRIAL_PASSES, lambda _: 1.0, n_rows=3)
    assert choice.choose(3) == 1


def test_passes_of_many_rows_use_all_threads_and_are_no_trials() -> None:
    choice = ThreadChoice(2)
    assert set(run(choice, TRIAL_PASSES, SHORT, n_rows=MAX_ROWS)) == {2}


def test_one_thread_leaves_nothing_to_choose() -> None:
    assert set(run(ThreadChoice(1), TRIAL_PASSES, SHORT)) == {1}
