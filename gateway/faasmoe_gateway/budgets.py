"""Budgets of a tenant per day and month, and its usage in these periods; pure.

Periods are calendar days and months in UTC. Usage counts when it is known, so a request that was
admitted below a budget may end above it; the next one is refused until the period ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from faasmoe_contracts.tenant_usage import PERIODS, Period, Unit, Usage, period_end_s

MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Budget:
    """What a tenant may use of something in each period.

    Attributes:
        unit: what is limited; money is in the currency of the prices.
        period: for how long.
        limit: how much, 0 or more.
        soft_fraction: part of the limit from which on the tenant is warned.
    """

    unit: Unit
    period: Period
    limit: float
    soft_fraction: float = 0.8

    def __post_init__(self) -> None:
        """Check the bounds; raises ValueError."""
        if not self.limit >= 0:
            raise ValueError(f"limit: got {self.limit}, expected 0 or more")
        if not 0 < self.soft_fraction <= 1:
            raise ValueError(f"soft_fraction: got {self.soft_fraction}, expected above 0 up to 1")


@dataclass(frozen=True, slots=True)
class Prices:
    """What tokens cost, per million.

    Attributes:
        input_per_million: of prompts.
        output_per_million: of what is generated.
    """

    input_per_million: float = 0.0
    output_per_million: float = 0.0

    def cost(self, input_tokens: int, output_tokens: int) -> float:
        """Return the price of tokens."""
        total = input_tokens * self.input_per_million + output_tokens * self.output_per_million
        return total / MILLION


@dataclass(frozen=True, slots=True)
class BudgetState:
    """Where a tenant is in one budget.

    Attributes:
        budget: which.
        used: how much of it is used.
        ends_s: when its period ends, in seconds since the epoch.
    """

    budget: Budget
    used: float
    ends_s: float

    @property
    def is_reached(self) -> bool:
        """Whether nothing is left."""
        return self.used >= self.budget.limit

    @property
    def is_soft_reached(self) -> bool:
        """Whether the tenant is to be warned."""
        return self.used >= self.budget.limit * self.budget.soft_fraction


class UsageByPeriod(Protocol):
    """What a tenant has used, wherever that is counted."""

    def in_period(self, time_s: float, period: Period) -> Usage:
        """Return the usage of the period of a time."""


def budget_states(
    budgets: Iterable[Budget], usage: UsageByPeriod, time_s: float
) -> tuple[BudgetState, ...]:
    """Return where a tenant is in each of its budgets."""
    used = {period: usage.in_period(time_s, period) for period in PERIODS}
    return tuple(
        BudgetState(
            budget,
            used[budget.period].amount(budget.unit),
            period_end_s(time_s, budget.period),
        )
        for budget in budgets
    )


def reached_budget(states: Iterable[BudgetState]) -> BudgetState | None:
    """Return the reached budget whose period ends last; None while requests are admitted."""
    reached = [state for state in states if state.is_reached]
    return max(reached, key=lambda state: state.ends_s, default=None)
