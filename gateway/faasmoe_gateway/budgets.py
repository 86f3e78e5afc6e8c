"""Budgets of a tenant per day and month, and its usage in these periods; pure.

Periods are calendar days and months in UTC. Usage counts when it is known, so a request that was
admitted below a budget may end above it; the next one is refused until the period ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Literal

Period = Literal["day", "month"]
Unit = Literal["inputTokens", "outputTokens", "money"]
PERIODS: tuple[Period, ...] = ("day", "month")
UNITS: tuple[Unit, ...] = ("inputTokens", "outputTokens", "money")
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


@dataclass(slots=True)
class Usage:
    """What was used.

    Attributes:
        requests: requests that got an answer.
        input_tokens: tokens of prompts.
        output_tokens: tokens generated.
        money: their price.
    """

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    money: float = 0.0

    def add(self, other: Usage) -> None:
        """Add what was used elsewhere."""
        self.requests += other.requests
        self.input_tokens += other.input_tokens
        self.output_tokens += other.output_tokens
        self.money += other.money

    def amount(self, unit: Unit) -> float:
        """Return how much of a unit was used."""
        amounts: Mapping[Unit, float] = {
            "inputTokens": self.input_tokens,
            "outputTokens": self.output_tokens,
            "money": self.money,
        }
        return amounts[unit]


def day_of(time_s: float) -> str:
    """Return the day of a time in seconds since the epoch, as 2026-11-29."""
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d")


def period_name(time_s: float, period: Period) -> str:
    """Return the day or the month of a time, as 2026-11-29 or 2026-11."""
    return day_of(time_s) if period == "day" else day_of(time_s)[:7]


def period_end_s(time_s: float, period: Period) -> float:
    """Return when the period of a time ends, in seconds since the epoch."""
    start = datetime.fromtimestamp(time_s, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        return (start + timedelta(days=1)).timestamp()
    return (start.replace(day=1) + timedelta(days=32)).replace(day=1).timestamp()


@dataclass(slots=True)
class TenantUsage:
    """A tenant's usage by day and model.

    Attributes:
        days: usage by day and model.
    """

    days: dict[str, dict[str, Usage]] = field(default_factory=dict)

    def add(self, time_s: float, model: str, usage: Usage) -> None:
        """Count usage of a model."""
        self.days.setdefault(day_of(time_s), {}).setdefault(model, Usage()).add(usage)

    def in_period(self, time_s: float, period: Period) -> Usage:
        """Return the usage of the period of a time, over all models."""
        name, total = period_name(time_s, period), Usage()
        for day, models in self.days.items():
            if day.startswith(name):
                for usage in models.values():
                    total.add(usage)
        return total

    def drop_before(self, day: str) -> None:
        """Forget what was used before a day."""
        self.days = {name: models for name, models in self.days.items() if name >= day}


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


def budget_states(
    budgets: Iterable[Budget], usage: TenantUsage, time_s: float
) -> tuple[BudgetState, ...]:
    """Return where a tenant is in each of its budgets."""
    in_period = {period: usage.in_period(time_s, period) for period in PERIODS}
    return tuple(
        BudgetState(
            budget,
            in_period[budget.period].amount(budget.unit),
            period_end_s(time_s, budget.period),
        )
        for budget in budgets
    )


def reached_budget(states: Iterable[BudgetState]) -> BudgetState | None:
    """Return the reached budget whose period ends last; None while requests are admitted."""
    reached = [state for state in states if state.is_reached]
    return max(reached, key=lambda state: state.ends_s, default=None)
