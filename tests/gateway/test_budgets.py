"""Budgets per day and month, told by moving the clock."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_contracts.tenant_usage import (
    TenantUsage,
    Usage,
    dump_usage,
    load_usage,
    period_end_s,
    period_name,
)
from faasmoe_gateway.budgets import Budget, Prices, budget_states, reached_budget


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


NOON = at("2026-11-29T12:00")


def test_budget_is_reached_and_free_again_the_next_day() -> None:
    usage, budgets = TenantUsage(), [Budget("outputTokens", "day", 100)]
    usage.add(NOON, "m", Usage(1, 10, 99))
    (state,) = budget_states(budgets, usage, NOON)
    assert not state.is_reached
    assert state.is_soft_reached
    usage.add(NOON + 1, "n", Usage(1, 10, 1))
    reached = reached_budget(budget_states(budgets, usage, NOON + 1))
    assert reached is not None
    assert reached.ends_s == at("2026-11-30T00:00")
    assert reached_budget(budget_states(budgets, usage, reached.ends_s)) is None


def test_month_counts_its_days_and_ends_with_the_month() -> None:
    usage, budgets = TenantUsage(), [Budget("inputTokens", "month", 30)]
    for day in ("2026-10-31", "2026-11-01", "2026-11-29"):
        usage.add(at(day), "m", Usage(1, 15, 0))
    reached = reached_budget(budget_states(budgets, usage, NOON))
    assert reached is not None
    assert reached.ends_s == at("2026-12-01T00:00")


def test_of_several_reached_budgets_the_one_that_ends_last_is_named() -> None:
    budgets = [Budget("money", "month", 1.0), Budget("inputTokens", "day", 5)]
    usage = TenantUsage()
    usage.add(NOON, "m", Usage(1, 10, 0, money=2.0))
    reached = reached_budget(budget_states(budgets, usage, NOON))
    assert reached is not None
    assert reached.budget.period == "month"


def test_budget_of_zero_is_reached_at_once() -> None:
    assert reached_budget(budget_states([Budget("money", "day", 0)], TenantUsage(), NOON))


def test_money_is_the_price_of_tokens() -> None:
    assert Prices(0.5, 2.0).cost(1_000_000, 500_000) == pytest.approx(1.5)


@pytest.mark.parametrize("limit", [-1, float("nan")])
def test_budget_below_zero_is_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="expected 0 or more"):
        Budget("money", "day", limit)


def test_old_days_are_dropped() -> None:
    usage = TenantUsage()
    usage.add(at("2026-10-31"), "m", Usage(1))
    usage.add(NOON, "m", Usage(1))
    usage.drop_before("2026-11-01")
    assert list(usage.days) == ["2026-11-29"]


@given(time_s=st.floats(0, 4e9), period=st.sampled_from(("day", "month")))
def test_periods_follow_each_other(time_s: float, period: str) -> None:
    end_s = period_end_s(time_s, period)  # type: ignore[arg-type]
    assert end_s > time_s
    assert period_name(end_s - 1, period) == period_name(time_s, period)  # type: ignore[arg-type]
    assert period_name(end_s, period) > period_name(time_s, period)  # type: ignore[arg-type]


def test_usage_survives_in_its_file() -> None:
    usage = TenantUsage()
    usage.add(NOON, "m", Usage(1, 2, 3, 0.5))
    usages, currencies = load_usage(dump_usage({"acme": usage}, {"acme": "EUR"}))
    assert usages["acme"].days == usage.days
    assert currencies == {"acme": "EUR"}


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"tenants": {"a": 1}}'])
def test_other_content_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"Expecting value|got no usage of tenants"):
        load_usage(content)
