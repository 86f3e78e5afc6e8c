"""Usage, budgets and limits of all tenants, and the file in which usage survives restarts."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

from faasmoe_contracts.atomic_file import quarantine, write_atomically
from faasmoe_contracts.gateway_file import TenantEntry
from faasmoe_contracts.lease_messages import LeaseAnswer, PeriodUsage, bucket_name
from faasmoe_contracts.tenant_usage import (
    Period,
    TenantUsage,
    Unit,
    Usage,
    day_of,
    dump_usage,
    load_usage,
    period_name,
)
from faasmoe_contracts.token_leases import LeaseRequest
from faasmoe_gateway.budgets import Budget, BudgetState, Prices, budget_states, reached_budget
from faasmoe_gateway.limits import TenantLimiter
from faasmoe_gateway.refusal import BUDGET_EXCEEDED, Refusal

logger = logging.getLogger(__name__)

KEPT_DAYS = 400
LEASED_S = 60.0  # since the last request of a tenant
DAY_S = 86_400.0
BUDGET_HEADER = "x-faasmoe-budget"


class TenantAccount:
    """What one tenant has used, and what it may still use.

    Args:
        tenant: the tenant.
        usage: what it has used so far through this gateway.
        now_s: current monotonic time in seconds.
        share: part of its limits that this gateway has without an authority.

    Attributes:
        limiter: its limits.
        usage: as given.
        elsewhere: what it has used through other gateways; None if there are none.
        currency: of its prices; empty without any.
    """

    def __init__(
        self, tenant: TenantEntry, usage: TenantUsage, now_s: float, *, share: float = 1.0
    ) -> None:
        self.usage = usage
        self.elsewhere: PeriodUsage | None = None
        self.limiter = TenantLimiter(tenant.limits, now_s, share=share)
        self._name = tenant.name
        self._warned: set[tuple[Budget, float]] = set()
        self.configure(tenant, now_s)

    def configure(self, tenant: TenantEntry, now_s: float) -> None:
        """Take other limits, budgets and prices."""
        self.limiter.replace_limits(tenant.limits, now_s)
        self.currency = "" if tenant.prices is None else tenant.prices.currency
        self._prices = Prices()
        if tenant.prices is not None:
            prices = tenant.prices
            self._prices = Prices(prices.input_per_million, prices.output_per_million)
        self._budgets = [
            Budget(cast(Unit, b.unit), cast(Period, b.period), b.limit, b.soft_percent / 100)
            for b in tenant.budgets
        ]

    def in_period(self, time_s: float, period: Period) -> Usage:
        """Return what was used in the period of a time, through all gateways."""
        total, other = self.usage.in_period(time_s, period), self.elsewhere
        if other is not None and other.day.startswith(period_name(time_s, period)):
            total.add(other.in_day if period == "day" else other.in_month)
        return total

    def check_budgets(self, time_s: float) -> dict[str, str]:
        """Return headers that tell of budgets that are nearly used.

        Raises:
            Refusal: a budget is used up.
        """
        if not self._budgets:
            return {}
        states = budget_states(self._budgets, self, time_s)
        if (reached := reached_budget(states)) is not None:
            raise _budget_reached(reached, time_s)
        soft = [state for state in states if state.is_soft_reached]
        for state in soft:
            if (state.budget, state.ends_s) not in self._warned:
                self._warned.add((state.budget, state.ends_s))
                logger.warning("Tenant %s has used %s", self._name, _describe(state))
        return {BUDGET_HEADER: "; ".join(map(_describe, soft))} if soft else {}

    def record(self, time_s: float, model: str, input_tokens: int, output_tokens: int) -> None:
        """Count a request that got an answer."""
        money = self._prices.cost(input_tokens, output_tokens)
        self.usage.add(time_s, model, Usage(1, input_tokens, output_tokens, money))


def _describe(state: BudgetState) -> str:
    budget = state.budget
    percent = 100 * state.used / budget.limit if budget.limit else 100.0
    return f"{percent:.0f}% of {budget.limit:g} {budget.unit} per {budget.period}"


def _budget_reached(state: BudgetState, time_s: float) -> Refusal:
    ends = datetime.fromtimestamp(state.ends_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    budget = state.budget
    return Refusal(
        f"Budget reached: {budget.limit:g} {budget.unit} per {budget.period}. "
        f"The next {budget.period} begins at {ends}.",
        status=429,
        code=BUDGET_EXCEEDED,
        headers={"retry-after": str(max(1, round(state.ends_s - time_s)))},
    )


class Accounts:
    """The accounts of all tenants.

    Args:
        tenants: the tenants.
        path: file of their usage; None keeps it in memory.
        now_s: current monotonic time in seconds.
        share: part of all limits that this gateway has without an authority.
    """

    def __init__(
        self,
        tenants: Iterable[TenantEntry],
        path: Path | None,
        now_s: float,
        *,
        share: float = 1.0,
    ) -> None:
        self._path = path
        self._share = share
        self._usages = {} if path is None else _read(path)
        self._accounts: dict[str, TenantAccount] = {}
        self._elsewhere: dict[str, PeriodUsage] = {}
        self.configure(tenants, now_s)
        self._saved = self._dumps()

    def configure(self, tenants: Iterable[TenantEntry], now_s: float) -> None:
        """Take other tenants; what those that stay have used, and may still use, stays."""
        known, self._accounts = self._accounts, {}
        for tenant in tenants:
            account = known.get(tenant.name)
            if account is None:
                usage = self._usages.setdefault(tenant.name, TenantUsage())
                account = TenantAccount(tenant, usage, now_s, share=self._share)
                account.elsewhere = self._elsewhere.get(tenant.name)
            else:
                account.configure(tenant, now_s)
            self._accounts[tenant.name] = account

    def of(self, tenant: str) -> TenantAccount:
        """Return a tenant's account."""
        return self._accounts[tenant]

    def lease_requests(self, now_s: float) -> dict[str, LeaseRequest]:
        """Return what to ask the authority for, of tenants that have called lately."""
        return {
            bucket_name(tenant, name): bucket.request(now_s)
            for tenant, account in self._accounts.items()
            if now_s - account.limiter.used_s <= LEASED_S
            for name, bucket in account.limiter.buckets.items()
        }

    def apply_leases(self, answer: LeaseAnswer, now_s: float) -> None:
        """Take what the authority has answered; it may know tenants earlier than this gateway."""
        self._elsewhere |= answer.usage
        for tenant, account in self._accounts.items():
            for name, bucket in account.limiter.buckets.items():
                full_name = bucket_name(tenant, name)
                if full_name in answer.levels:
                    account.limiter.elsewhere[name] = answer.levels[full_name]
                if (grant := answer.grants.get(full_name)) is not None:
                    bucket.apply(grant, now_s)
            if tenant in answer.usage:
                account.elsewhere = answer.usage[tenant]

    def period_usage(self, time_s: float) -> dict[str, PeriodUsage]:
        """Return what each tenant has used through this gateway in the current day and month."""
        return {
            tenant: PeriodUsage(
                day_of(time_s),
                account.usage.in_period(time_s, "day"),
                account.usage.in_period(time_s, "month"),
            )
            for tenant, account in self._accounts.items()
            if account.usage.days
        }

    def changed(self, time_s: float) -> bytes | None:
        """Return what to save; None if nothing was used since it was last returned."""
        oldest = day_of(time_s - KEPT_DAYS * DAY_S)
        for usage in self._usages.values():
            usage.drop_before(oldest)
        content = self._dumps()
        if self._path is None or content == self._saved:
            return None
        self._saved = content
        return content

    def write(self, content: bytes) -> None:
        """Replace the file."""
        assert self._path is not None
        write_atomically(self._path, content, 0o600)

    def _dumps(self) -> bytes:
        currencies = {name: account.currency for name, account in self._accounts.items()}
        return dump_usage(self._usages, currencies)


def _read(path: Path) -> dict[str, TenantUsage]:
    """Return the usage of a file; a damaged one is kept aside, and counting begins anew."""
    try:
        return load_usage(path.read_bytes())[0]
    except FileNotFoundError:
        return {}
    except ValueError as error:
        logger.error("%s: %s; moved to %s", path, error, quarantine(path))
        return {}
