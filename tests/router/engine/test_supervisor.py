"""The restart budget."""

from faasmoe_router.engine.supervisor import RestartBudget


def test_restart_budget_allows_the_limit_within_the_window() -> None:
    budget = RestartBudget(limit=2, window_s=10)
    assert [budget.try_acquire(now_s) for now_s in (0, 1, 2, 9.9)] == [True, True, False, False]


def test_restart_budget_recovers_after_the_window() -> None:
    budget = RestartBudget(limit=1, window_s=10)
    assert [budget.try_acquire(now_s) for now_s in (0, 5, 10, 15)] == [True, False, True, False]
