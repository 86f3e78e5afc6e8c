"""Policies of what stays in limited memory, on hand-made records of calls."""

from benchmarks.residency import (
    IDLE_STEPS,
    POLICIES,
    Step,
    best_fixed,
    format_policies,
    kernel_residency,
    lfu,
    lru_at_each_miss,
    lru_unless_in_use,
)

A, B, C = (0, 0), (0, 1), (0, 2)


def test_lru_thrashes_when_every_step_calls_more_than_fits() -> None:
    steps: list[Step] = [{A: 1, B: 1, C: 1}] * 10
    found = lru_at_each_miss(steps, 2)
    assert (found.calls_found, found.loads) == (0, 30)


def test_what_is_in_use_is_not_evicted() -> None:
    steps: list[Step] = [{A: 1, B: 1, C: 1}] * 10
    found = lru_unless_in_use(steps, 2)
    assert found.resident == {A, B}
    assert (found.calls_found, found.calls, found.loads) == (18, 30, 2)


def test_what_is_idle_makes_room() -> None:
    steps: list[Step] = [{A: 1, B: 1}, *([{B: 1, C: 1}] * (IDLE_STEPS + 1))]
    found = lru_unless_in_use(steps, 2)
    assert found.resident == {B, C}
    assert found.loads == 3


def test_lfu_replaces_what_is_called_less_often_by_a_lead() -> None:
    steps: list[Step] = [{A: 1, B: 1}, *([{B: 1, C: 4}] * 5)]
    assert lfu(steps, 1, lead=1.25).resident == {C}
    even: list[Step] = [{A: 2}, {B: 2}] * 5
    assert lfu(even, 1, lead=1.25).loads == 1


def test_best_fixed_choice_counts_rows() -> None:
    steps: list[Step] = [{A: 1, B: 5}, {A: 1}, {A: 1, C: 1}]
    found = best_fixed(steps, 1)
    assert found.resident == {B}
    assert (found.rows_found, found.rows, found.calls_found, found.calls) == (5, 9, 1, 5)


def test_the_page_cache_keeps_what_is_called_often_beside_prompts_that_call_all() -> None:
    everything = dict.fromkeys([(0, expert) for expert in range(8)], 1)
    steps: list[Step] = [everything if n % 4 == 0 else {A: 1, B: 1} for n in range(400)]
    found, lru = kernel_residency(steps, 4), lru_at_each_miss(steps, 4)
    assert {A, B} <= found.resident
    assert found.loads < 0.8 * lru.loads


def test_every_policy_has_a_row_and_stays_within_its_capacity() -> None:
    steps: list[Step] = [{A: 1, B: 2}, {B: 1, C: 1}, {A: 3, C: 1}]
    for policy in POLICIES.values():
        assert len(policy(steps, 2).resident) <= 2
    assert len(format_policies(steps, capacity=2, n_tokens=3).splitlines()) == 1 + len(POLICIES)
