"""Usage of tenants over gateways that come and go, and over restarts of the ledger."""

from __future__ import annotations

import json

import hypothesis.strategies as st
from hypothesis import given, settings

from faasmoe_contracts.lease_messages import PeriodUsage
from faasmoe_contracts.tenant_usage import Usage
from faasmoe_operator.control.tenant_ledger import MAX_RUNS, TenantLedger

DAY = "2026-11-29"


def used(n_tokens: int, *, day: str = DAY, month: int | None = None) -> PeriodUsage:
    in_month = n_tokens if month is None else month
    return PeriodUsage(day, Usage(output_tokens=n_tokens), Usage(output_tokens=in_month))


def tokens(ledger: TenantLedger) -> tuple[int, int]:
    total = ledger.tenants["acme"].total
    return total.in_day.output_tokens, total.in_month.output_tokens


def restored(ledger: TenantLedger) -> TenantLedger:
    again = TenantLedger()
    again.restore("acme", json.loads(json.dumps(ledger.dump("acme"))))
    return again


def test_totals_outlive_runs_and_the_ledger() -> None:
    ledger = TenantLedger()
    ledger.report("a", {"acme": used(5)})
    ledger.report("b", {"acme": used(3)})
    ledger.report("a", {"acme": used(7)})
    assert tokens(ledger) == (10, 10)
    assert ledger.without("a")["acme"].in_day.output_tokens == 3
    again = restored(ledger)
    again.report("a", {"acme": used(8)})  # goes on counting
    again.report("c", {"acme": used(1)})  # began after the restart
    assert tokens(again) == (12, 12)


def test_a_new_day_begins_at_zero_and_a_new_month_too() -> None:
    ledger = TenantLedger()
    ledger.report("a", {"acme": used(5)})
    ledger.report("a", {"acme": used(2, day="2026-11-30", month=7)})
    assert tokens(ledger) == (2, 7)
    ledger.report("b", {"acme": used(4)})  # its clock is behind
    assert tokens(ledger) == (2, 11)
    ledger.report("a", {"acme": used(1, day="2026-12-01", month=1)})
    assert tokens(ledger) == (1, 1)
    assert ledger.without("b")["acme"].in_month.output_tokens == 1


def test_runs_are_bounded() -> None:
    ledger = TenantLedger()
    for number in range(MAX_RUNS + 10):
        ledger.report(str(number), {"acme": used(1)})
    assert len(ledger.tenants["acme"].runs) == MAX_RUNS
    assert tokens(ledger) == (MAX_RUNS + 10, MAX_RUNS + 10)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.booleans(), st.booleans()),
        max_size=40,
    )
)
def test_every_token_counts_once(steps: list[tuple[str, int, bool, bool]]) -> None:
    """Whichever reports are lost or repeated, and whenever the ledger is restarted."""
    ledger, counted = TenantLedger(), {"a": 0, "b": 0, "c": 0}
    for run, n_tokens, is_lost, is_restarted in steps:
        counted[run] += n_tokens
        if not is_lost:
            ledger.report(run, {"acme": used(counted[run])})
        if is_restarted and ledger.dump("acme") is not None:
            ledger = restored(ledger)
    for run, n_tokens in counted.items():
        ledger.report(run, {"acme": used(n_tokens)})
    assert tokens(ledger) == (sum(counted.values()), sum(counted.values()))
    for run, n_tokens in counted.items():
        others = sum(counted.values()) - n_tokens
        found = ledger.without(run).get("acme")
        assert others == (0 if found is None else found.in_day.output_tokens)
