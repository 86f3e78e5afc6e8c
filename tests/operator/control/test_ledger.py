"""What is told in any order, twice, or not at all adds up to what was used."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_operator.control import ledger as ledger_module
from faasmoe_operator.control.ledger import Ledger, Statement, Use
from faasmoe_operator.control.ledger_record import decode, encode

SOME = Use(7, 5, 2, 1, 0, 3, 1.5, 0.25)
MORE = Use(9, 6, 3, 1, 1, 3, 2.0, 0.5)
AMPLE = 1 << 20


def said(book: str = "a", *, ends: bool = False, **tenants: Use) -> Statement:
    return Statement(book, 100.0, tenants, ends=ends)


def test_two_books_are_added_up_and_what_is_told_twice_counts_once() -> None:
    ledger = Ledger(500.0)
    for statement in (said(acme=SOME), said("b", acme=SOME, beta=MORE), said(acme=SOME)):
        ledger.take(statement)
    assert ledger.accounts == {"acme": SOME + SOME, "beta": MORE}
    assert ledger.since_s == 100.0
    ledger.take(said(acme=MORE))
    assert ledger.accounts["acme"] == SOME + MORE


def test_a_book_that_lost_its_last_lines_takes_nothing_back_and_counts_nothing_twice() -> None:
    ledger = Ledger(0.0)
    for use in (MORE, SOME, MORE):
        ledger.take(said(acme=use))
    assert ledger.accounts["acme"] == MORE


def test_only_what_is_new_is_worth_writing() -> None:
    ledger = Ledger(0.0)
    ledger.take(said(acme=SOME))
    told = ledger.n_tellings
    ledger.take(said(acme=SOME))
    assert (ledger.n_tellings, ledger.n_endings) == (told, 0)
    ledger.take(said(acme=SOME, ends=True))
    assert (ledger.n_tellings, ledger.n_endings) == (told, 1)


TELLINGS = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.sampled_from(["acme", "beta"]),
        st.integers(0, 1000),
        st.booleans(),
        st.booleans(),
    ),
    max_size=40,
)


@given(tellings=TELLINGS)
def test_tellings_may_be_lost_and_the_control_begun_anew(
    tellings: list[tuple[str, str, int, bool, bool]],
) -> None:
    """Each step uses more through a router; its telling, or the control's memory, may be lost."""
    ledger, written = Ledger(0.0), Ledger(0.0)
    books: dict[str, dict[str, Use]] = {name: {} for name in "abc"}
    for book, tenant, n_tokens, is_heard, is_lost in tellings:
        used = Use(prompt_tokens=n_tokens, expert_seconds=n_tokens / 8)
        books[book][tenant] = books[book].get(tenant, Use()) + used
        if is_heard:
            ledger.take(Statement(book, 0.0, books[book]))
        if is_lost:
            ledger = decode(encode(written, max_chars=AMPLE))
        written = decode(encode(ledger, max_chars=AMPLE))
    for book, uses in books.items():
        ledger.take(Statement(book, 0.0, uses))
    for tenant in ("acme", "beta"):
        each = [uses.get(tenant, Use()) for uses in books.values()]
        found = ledger.accounts.get(tenant, Use())
        assert found.prompt_tokens == sum(use.prompt_tokens for use in each)
        assert found.expert_seconds == sum(use.expert_seconds for use in each)


def test_books_are_bounded_and_their_accounts_are_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ledger_module, "MAX_BOOKS", 2)
    ledger = Ledger(0.0)
    for book in "abac":
        ledger.take(said(book, acme=SOME))
    assert list(ledger.books) == ["a", "c"]
    assert ledger.accounts["acme"] == SOME + SOME + SOME


def test_there_is_room_for_so_many_tenants_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_module, "MAX_ACCOUNTS", 2)
    ledger = Ledger(0.0)
    ledger.take(said(acme=SOME))
    assert ledger.has_room_for(["acme", "beta"])
    assert not ledger.has_room_for(["beta", "gamma"])


def test_is_read_as_it_was_written() -> None:
    ledger = Ledger(12.5)
    ledger.take(said(acme=SOME))
    ledger.take(said("b", beta=MORE))
    read = decode(encode(ledger, max_chars=AMPLE))
    assert (read.since_s, read.accounts, read.books) == (12.5, ledger.accounts, ledger.books)


def test_of_a_text_that_would_be_too_long_the_oldest_books_are_left_out() -> None:
    ledger = Ledger(0.0)
    for number in range(50):
        use = replace(SOME, prompt_tokens=number)
        ledger.take(said(f"{number:032x}", acme=use))
    text = encode(ledger, max_chars=1500)
    read = decode(text)
    assert len(text) <= 1500
    assert read.accounts == ledger.accounts
    assert len(read.books) > 5
    assert list(read.books) == list(ledger.books)[-len(read.books) :]
