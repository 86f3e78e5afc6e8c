"""The retry budget's ratio and burst."""

from hypothesis import given
from hypothesis import strategies as st

from faasmoe_router.dispatch.endpoint_health import RetryBudget


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5)), max_size=200))
def test_withdrawals_never_exceed_the_ratio_plus_one_burst(rounds: list[tuple[int, int]]) -> None:
    budget = RetryBudget(ratio=0.05, burst=8)
    n_calls = n_extra = 0
    for calls, n_requested in rounds:
        budget.deposit(calls)
        n_calls += calls
        n_extra += sum(budget.try_withdraw() for _ in range(n_requested))
        assert n_extra <= 0.05 * n_calls + 8 + 1e-6


def test_unused_balance_is_capped_at_the_burst() -> None:
    budget = RetryBudget(ratio=0.5, burst=2)
    budget.deposit(1000)
    assert [budget.try_withdraw() for _ in range(3)] == [True, True, False]
    budget.deposit(2)
    assert budget.try_withdraw()
