"""What is told in any order, twice, or not at all adds up to what was used."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_operator.control import usage_ledger as ledger_module
from faasmoe_operator.control.usage_ledger import (
    TenantUsage,
    UsageLedger,
    UsageReport,
    decode_ledger,
    encode_ledger,
)

SOME = TenantUsage(7, 5, 2, 1, 0, 3, 1.5, 0.25)
MORE = TenantUsage(9, 6, 3, 1, 1, 3, 2.0, 0.5)
AMPLE = 1 << 20


def usage_report(
    source: str = "a", *, is_final: bool = False, **tenants: TenantUsage
) -> UsageReport:
    return UsageReport(source, 100.0, tenants, is_final=is_final)


def test_two_books_are_added_up_and_what_is_told_twice_counts_once() -> None:
    ledger = UsageLedger(500.0)
    for statement in (
        usage_report(acme=SOME),
        usage_report("b", acme=SOME, beta=MORE),
        usage_report(acme=SOME),
    ):
        ledger.add_report(statement)
    assert ledger.usage_by_tenant == {"acme": SOME + SOME, "beta": MORE}
    assert ledger.since_s == 100.0
    ledger.add_report(usage_report(acme=MORE))
    assert ledger.usage_by_tenant["acme"] == SOME + MORE


def test_a_book_that_lost_its_last_lines_takes_nothing_back_and_counts_nothing_twice() -> None:
    ledger = UsageLedger(0.0)
    for use in (MORE, SOME, MORE):
        ledger.add_report(usage_report(acme=use))
    assert ledger.usage_by_tenant["acme"] == MORE


def test_only_what_is_new_is_worth_writing() -> None:
    ledger = UsageLedger(0.0)
    ledger.add_report(usage_report(acme=SOME))
    told = ledger.n_updates
    ledger.add_report(usage_report(acme=SOME))
    assert (ledger.n_updates, ledger.n_final_reports) == (told, 0)
    ledger.add_report(usage_report(acme=SOME, is_final=True))
    assert (ledger.n_updates, ledger.n_final_reports) == (told, 1)


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


@given(tellings=REPORTS)
def test_tellings_may_be_lost_and_the_control_begun_anew(
    tellings: list[tuple[str, str, int, bool, bool]],
) -> None:
    """Each step uses more through a router; its telling, or the control's memory, may be lost."""
    ledger, written = UsageLedger(0.0), UsageLedger(0.0)
    books: dict[str, dict[str, TenantUsage]] = {name: {} for name in "abc"}
    for book, tenant, n_tokens, is_heard, is_lost in tellings:
        used = TenantUsage(prompt_tokens=n_tokens, expert_seconds=n_tokens / 8)
        books[book][tenant] = books[book].get(tenant, TenantUsage()) + used
        if is_heard:
            ledger.add_report(UsageReport(book, 0.0, books[book]))
        if is_lost:
            ledger = decode_ledger(encode_ledger(written, max_chars=AMPLE))
        written = decode_ledger(encode_ledger(ledger, max_chars=AMPLE))
    for book, uses in books.items():
        ledger.add_report(UsageReport(book, 0.0, uses))
    for tenant in ("acme", "beta"):
        each = [uses.get(tenant, TenantUsage()) for uses in books.values()]
        found = ledger.usage_by_tenant.get(tenant, TenantUsage())
        assert found.prompt_tokens == sum(use.prompt_tokens for use in each)
        assert found.expert_seconds == sum(use.expert_seconds for use in each)


def test_books_are_bounded_and_their_accounts_are_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ledger_module, "MAX_USAGE_SOURCES", 2)
    ledger = UsageLedger(0.0)
    for book in "abac":
        ledger.add_report(usage_report(book, acme=SOME))
    assert list(ledger.last_reported) == ["a", "c"]
    assert ledger.usage_by_tenant["acme"] == SOME + SOME + SOME


def test_there_is_room_for_so_many_tenants_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MAX_TENANTS_IN_LEDGER", 2)
    ledger = UsageLedger(0.0)
    ledger.add_report(usage_report(acme=SOME))
    assert ledger.has_capacity_for(["acme", "beta"])
    assert not ledger.has_capacity_for(["beta", "gamma"])


def test_is_read_as_it_was_written() -> None:
    ledger = UsageLedger(12.5)
    ledger.add_report(usage_report(acme=SOME))
    ledger.add_report(usage_report("b", beta=MORE))
    read = decode_ledger(encode_ledger(ledger, max_chars=AMPLE))
    assert (read.since_s, read.usage_by_tenant, read.last_reported) == (
        12.5,
        ledger.usage_by_tenant,
        ledger.last_reported,
    )


def test_of_a_text_that_would_be_too_long_the_oldest_books_are_left_out() -> None:
    ledger = UsageLedger(0.0)
    for number in range(50):
        use = replace(SOME, prompt_tokens=number)
        ledger.add_report(usage_report(f"{number:032x}", acme=use))
    text = encode_ledger(ledger, max_chars=1500)
    read = decode_ledger(text)
    assert len(text) <= 1500
    assert read.usage_by_tenant == ledger.usage_by_tenant
    assert len(read.last_reported) > 5
    assert list(read.last_reported) == list(ledger.last_reported)[-len(read.last_reported) :]
