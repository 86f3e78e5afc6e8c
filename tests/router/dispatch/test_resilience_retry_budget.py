from hypothesis import given
from hypothesis import strategies as st

from faasmoe_router.dispatch.resilience import RetryBudget


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5)), max_size=200))
def test_extra_calls_never_exceed_their_share_and_one_burst(rounds: list[tuple[int, int]]) -> None:
    extra = RetryBudget(ratio=0.05, burst=8)
    n_calls = n_extra = 0
    for calls, wished in rounds:
        extra.deposit(calls)
        n_calls += calls
        n_extra += sum(extra.try_withdraw() for _ in range(wished))
        assert n_extra <= 0.05 * n_calls + 8 + 1e-6


def test_what_was_not_used_is_kept_up_to_a_burst() -> None:
    extra = RetryBudget(ratio=0.5, burst=2)
    extra.deposit(1000)
    assert [extra.try_withdraw() for _ in range(3)] == [True, True, False]
    extra.deposit(2)
    assert extra.try_withdraw()
