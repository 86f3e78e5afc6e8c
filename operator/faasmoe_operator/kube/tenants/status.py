"""Conditions and status of a Tenant. Pure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from faasmoe_contracts.lease_messages import PeriodUsage
from faasmoe_contracts.tenant_usage import Usage, day_of, period_end_s
from faasmoe_operator.api.v1alpha1.tenant import BudgetSpec, Tenant
from faasmoe_operator.api.v1alpha1.tenant_status import MAX_RECORD_CHARS
from faasmoe_operator.control.tenant_ledger import rolled
from faasmoe_operator.kube.conditions import (
    READY,
    ConditionState,
    condition_false,
    condition_true,
    condition_unknown,
)
from faasmoe_operator.kube.events import ModelEvent, transition_events
from faasmoe_operator.kube.tenants.plan import TenantOutcome
from faasmoe_operator.kube.types import Object

ACCEPTED, KEYS_READY, MODELS_READY = "Accepted", "KeysReady", "ModelsReady"
WITHIN_BUDGET = "WithinBudget"
BUDGET_NEARLY_USED = "BudgetNearlyUsed"
TenantConditions = dict[str, ConditionState]


def tenant_conditions(
    outcome: TenantOutcome, tenant: Tenant | None, usage: PeriodUsage | None, time_s: float
) -> TenantConditions:
    """Return the state of each condition, Ready first.

    Args:
        outcome: what becomes of the Tenant.
        tenant: the parsed Tenant; None if it is invalid.
        usage: what it has used.
        time_s: current time in seconds since the epoch.
    """
    parts = {
        ACCEPTED: outcome.accepted,
        KEYS_READY: outcome.keys,
        MODELS_READY: outcome.models,
    }
    budgets = () if tenant is None else tenant.spec.budgets
    return {READY: _ready(parts), **parts, WITHIN_BUDGET: _budgets_state(budgets, usage, time_s)}


def _ready(parts: TenantConditions) -> ConditionState:
    for status, make in (("False", condition_false), ("Unknown", condition_unknown)):
        for name, state in parts.items():
            if state.status == status:
                return make(state.reason, f"{name}: {state.message}")
    return condition_true("Ready", "the tenant may call all of its models")


def _budgets_state(
    budgets: Sequence[BudgetSpec], usage: PeriodUsage | None, time_s: float
) -> ConditionState:
    """Return whether a budget is used up; a used-up budget is a state, no fault of the Tenant."""
    if not budgets:
        return condition_true("NoBudget", "spec.budgets is empty")
    nearly = []
    for budget in budgets:
        used = _used(budget, usage, time_s)
        what = f"{budget.limit:g} {budget.unit} per {budget.period}"
        if used >= budget.limit:
            ends = datetime.fromtimestamp(period_end_s(time_s, budget.period), UTC)
            next_period = ends.strftime("%Y-%m-%dT%H:%M:%SZ")
            message = f"{what} is used up; requests are refused until {next_period}"
            return condition_false("BudgetReached", message)
        if used >= budget.limit * budget.soft_percent / 100:
            nearly.append(f"{budget.soft_percent} % of {what}")
    if nearly:
        return condition_true(BUDGET_NEARLY_USED, f"used more than {', '.join(nearly)}")
    return condition_true("WithinBudget", "every budget has something left")


def _used(budget: BudgetSpec, usage: PeriodUsage | None, time_s: float) -> float:
    if usage is None:
        return 0.0
    current = rolled(usage, day_of(time_s))
    period = current.in_day if budget.period == "day" else current.in_month
    return period.amount(budget.unit)


def tenant_events(before: Sequence[Object], after: Sequence[Object]) -> list[ModelEvent]:
    """Return the events of a change of conditions; that a budget is nearly used is one, too."""
    events = transition_events(before, after)
    old = next((c for c in before if c.get("type") == WITHIN_BUDGET), {})
    new = next(c for c in after if c["type"] == WITHIN_BUDGET)
    if new["reason"] == BUDGET_NEARLY_USED != old.get("reason"):
        events = [event for event in events if event.reason != BUDGET_NEARLY_USED]
        events.append(ModelEvent("Warning", BUDGET_NEARLY_USED, new["message"]))
    return events


def tenant_status(
    outcome: TenantOutcome,
    conditions: Sequence[Object],
    usage: PeriodUsage | None,
    record: dict[str, Any] | None,
    *,
    generation: int,
) -> Object:
    """Return the complete status.

    Args:
        outcome: what becomes of the Tenant.
        conditions: its conditions.
        usage: what it has used; None for nothing yet.
        record: its usage as the ledger saves it; None for none.
        generation: generation of the spec that the status describes.
    """
    status: Object = {
        "observedGeneration": generation,
        "conditions": list(conditions),
        "keys": outcome.n_keys,
        "models": list(outcome.model_names),
    }
    if usage is not None:
        status["usage"] = {
            "day": usage.day,
            "inDay": _usage_fields(usage.in_day),
            "inMonth": _usage_fields(usage.in_month),
        }
    if record is not None:
        status["usageRecord"] = _dump_record(record)
    return status


def _usage_fields(usage: Usage) -> Object:
    return {
        "requests": usage.requests,
        "inputTokens": usage.input_tokens,
        "outputTokens": usage.output_tokens,
        "cost": usage.money,
    }


def _dump_record(record: dict[str, Any]) -> str:
    """Return a record as text that fits; the runs that reported longest ago are left out."""
    runs = dict(record["runs"])
    while True:
        text = json.dumps({**record, "runs": runs}, separators=(",", ":"))
        if len(text) <= MAX_RECORD_CHARS:
            return text
        del runs[next(iter(runs))]


def without_usage(status: Object | None) -> Object:
    """Return a status without what follows the traffic."""
    return {k: v for k, v in (status or {}).items() if k not in ("usage", "usageRecord")}
