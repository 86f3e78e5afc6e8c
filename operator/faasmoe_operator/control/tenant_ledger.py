"""What tenants used in the current day and month, over all gateways and their restarts. No I/O.

Gateways report what each of their processes (a run) has used in the day and in the month. The
ledger adds the increase to the tenant's totals, so that a report may be lost or repeated, and the
totals stay when a run ends. Totals and reports are saved together, so that a restarted ledger
counts nothing twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from faasmoe_contracts.json_reader import ObjectReader
from faasmoe_contracts.lease_messages import PeriodUsage
from faasmoe_contracts.tenant_usage import Usage

MAX_RUNS = 64  # of a tenant: those that reported last; one that is dropped would count anew
_EMPTY = PeriodUsage("0000-00-00", Usage(), Usage())


@dataclass(slots=True)
class TenantTotals:
    """The usage of one tenant.

    Attributes:
        total: over all runs.
        runs: what each run has reported last.
    """

    total: PeriodUsage = _EMPTY
    runs: dict[str, PeriodUsage] = field(default_factory=dict)

    def add(self, run: str, used: PeriodUsage) -> None:
        """Take a report."""
        known = self.runs.pop(run, _EMPTY)
        self.runs[run] = used
        while len(self.runs) > MAX_RUNS:
            del self.runs[next(iter(self.runs))]
        base = rolled(self.total, used.day)
        before, now = rolled(known, base.day), rolled(used, base.day)
        self.total = PeriodUsage(
            base.day,
            _increased(base.in_day, now.in_day, before.in_day),
            _increased(base.in_month, now.in_month, before.in_month),
        )

    def without(self, run: str) -> PeriodUsage:
        """Return the usage of all other runs."""
        own = rolled(self.runs.get(run, _EMPTY), self.total.day)
        nothing = Usage()
        return PeriodUsage(
            self.total.day,
            _increased(nothing, self.total.in_day, own.in_day),
            _increased(nothing, self.total.in_month, own.in_month),
        )


class TenantLedger:
    """The usage of all tenants.

    Attributes:
        tenants: totals by tenant.
    """

    def __init__(self) -> None:
        self.tenants: dict[str, TenantTotals] = {}

    def report(self, run: str, usage: Mapping[str, PeriodUsage]) -> None:
        """Take what a run has used, by tenant."""
        for tenant, used in usage.items():
            self.tenants.setdefault(tenant, TenantTotals()).add(run, used)

    def without(self, run: str) -> dict[str, PeriodUsage]:
        """Return what tenants used through other runs, if anything."""
        others = {tenant: totals.without(run) for tenant, totals in self.tenants.items()}
        return {tenant: used for tenant, used in others.items() if used.in_month != Usage()}

    def dump(self, tenant: str) -> dict[str, Any] | None:
        """Return a tenant's totals to be saved; None if it has used nothing."""
        totals = self.tenants.get(tenant)
        if totals is None:
            return None
        runs = {run: asdict(used) for run, used in totals.runs.items()}
        return {"total": asdict(totals.total), "runs": runs}

    def restore(self, tenant: str, saved: object) -> None:
        """Take a tenant's saved totals, unless it has some; raises ContractError."""
        reader = ObjectReader(saved, field="usage", known=("total", "runs"))
        total = PeriodUsage.from_json(reader.get("total"), path="usage.total")
        runs = reader.mapping("runs", max_length=MAX_RUNS).items()
        parsed = {run: PeriodUsage.from_json(used, path=f"usage.runs.{run}") for run, used in runs}
        self.tenants.setdefault(tenant, TenantTotals(total, parsed))


def rolled(used: PeriodUsage, day: str) -> PeriodUsage:
    """Return usage as of a day: what ended before it is nothing. A later day stays."""
    if used.day >= day:
        return used
    in_month = used.in_month if used.day[:7] == day[:7] else Usage()
    return PeriodUsage(day, Usage(), in_month)


def _increased(base: Usage, now: Usage, before: Usage) -> Usage:
    """Return a sum with what was added to a count since."""
    return Usage(
        base.requests + max(0, now.requests - before.requests),
        base.input_tokens + max(0, now.input_tokens - before.input_tokens),
        base.output_tokens + max(0, now.output_tokens - before.output_tokens),
        base.money + max(0.0, now.money - before.money),
    )
