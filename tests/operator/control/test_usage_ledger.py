"""Reports in any order, repeated or lost, add up to the usage."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_contracts.usage import UsageRecord, UsageReport
from faasmoe_operator.control import usage_ledger as ledger_module
from faasmoe_operator.control.usage_ledger import UsageLedger, decode_ledger, encode_ledger

USAGE = UsageRecord(7, 5, 2, 1, 0, 3, 1.5, 0.25)
LATER_USAGE = UsageRecord(9, 6, 3, 1, 1, 3, 2.0, 0.5)
NO_LIMIT = 1 << 20


def usage_report(
    source: str = "a", *, is_final: bool = False, **tenants: UsageRecord
) -> UsageReport:
    return UsageReport(source, 100.0, tenants, is_final=is_final)


def test_sources_are_added_and_repeated_reports_count_once() -> None:
    ledger = UsageLedger(500.0)
    for report in (
        usage_report(acme=USAGE),
        usage_report("b", acme=USAGE, beta=LATER_USAGE),
        usage_report(acme=USAGE),
    ):
        ledger.add_report(report)
    assert ledger.usage_by_tenant == {"acme": USAGE + USAGE, "beta": LATER_USAGE}
    assert ledger.since_s == 100.0
    ledger.add_report(usage_report(acme=LATER_USAGE))
    assert ledger.usage_by_tenant["acme"] == USAGE + LATER_USAGE


def test_a_source_with_lower_totals_neither_subtracts_nor_counts_twice() -> None:
    ledger = UsageLedger(0.0)
    for usage in (LATER_USAGE, USAGE, LATER_USAGE):
        ledger.add_report(usage_report(acme=usage))
    assert ledger.usage_by_tenant["acme"] == LATER_USAGE


def test_only_new_usage_counts_as_an_update() -> None:
    ledger = UsageLedger(0.0)
    ledger.add_report(usage_report(acme=USAGE))
    n_updates = ledger.n_updates
    ledger.add_report(usage_report(acme=USAGE))
    assert (ledger.n_updates, ledger.n_final_reports) == (n_updates, 0)
    ledger.add_report(usage_report(acme=USAGE, is_final=True))
    assert (ledger.n_updates, ledger.n_final_reports) == (n_updates, 1)


REPORTS = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.sampled_from(["acme", "beta"]),
        st.integers(0, 1000),
        st.booleans(),
        st.booleans(),
    ),
    max_size=40,
)


@given(steps=REPORTS)
def test_reports_may_be_lost_and_the_control_process_restarted(
    steps: list[tuple[str, str, int, bool, bool]],
) -> None:
    """Each step adds usage; its report, or the ledger since the last write, may be lost."""
    ledger, written = UsageLedger(0.0), UsageLedger(0.0)
    sources: dict[str, dict[str, UsageRecord]] = {name: {} for name in "abc"}
    for source, tenant, n_tokens, is_received, is_restarted in steps:
        increase = UsageRecord(prompt_tokens=n_tokens, expert_seconds=n_tokens / 8)
        sources[source][tenant] = sources[source].get(tenant, UsageRecord()) + increase
        if is_received:
            ledger.add_report(UsageReport(source, 0.0, sources[source]))
        if is_restarted:
            ledger = decode_ledger(encode_ledger(written, max_chars=NO_LIMIT))
        written = decode_ledger(encode_ledger(ledger, max_chars=NO_LIMIT))
    for source, totals in sources.items():
        ledger.add_report(UsageReport(source, 0.0, totals))
    for tenant in ("acme", "beta"):
        each = [totals.get(tenant, UsageRecord()) for totals in sources.values()]
        found = ledger.usage_by_tenant.get(tenant, UsageRecord())
        assert found.prompt_tokens == sum(usage.prompt_tokens for usage in each)
        assert found.expert_seconds == sum(usage.expert_seconds for usage in each)


def test_sources_are_bounded_and_their_usage_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ledger_module, "MAX_USAGE_SOURCES", 2)
    ledger = UsageLedger(0.0)
    for source in "abac":
        ledger.add_report(usage_report(source, acme=USAGE))
    assert list(ledger.last_reported) == ["a", "c"]
    assert ledger.usage_by_tenant["acme"] == USAGE + USAGE + USAGE


def test_the_number_of_tenants_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MAX_TENANTS_IN_LEDGER", 2)
    ledger = UsageLedger(0.0)
    ledger.add_report(usage_report(acme=USAGE))
    assert ledger.has_capacity_for(["acme", "beta"])
    assert not ledger.has_capacity_for(["beta", "gamma"])


def test_is_read_as_it_was_written() -> None:
    ledger = UsageLedger(12.5)
    ledger.add_report(usage_report(acme=USAGE))
    ledger.add_report(usage_report("b", beta=LATER_USAGE))
    read = decode_ledger(encode_ledger(ledger, max_chars=NO_LIMIT))
    assert (read.since_s, read.usage_by_tenant, read.last_reported) == (
        12.5,
        ledger.usage_by_tenant,
        ledger.last_reported,
    )


def test_the_oldest_sources_are_omitted_from_a_text_that_is_too_long() -> None:
    ledger = UsageLedger(0.0)
    for number in range(50):
        usage = replace(USAGE, prompt_tokens=number)
        ledger.add_report(usage_report(f"{number:032x}", acme=usage))
    text = encode_ledger(ledger, max_chars=1500)
    read = decode_ledger(text)
    assert len(text) <= 1500
    assert read.usage_by_tenant == ledger.usage_by_tenant
    assert len(read.last_reported) > 5
    assert list(read.last_reported) == list(ledger.last_reported)[-len(read.last_reported) :]
