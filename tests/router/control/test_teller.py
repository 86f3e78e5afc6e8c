"""Accounts are told again and again, and what others have used is heard; nonsense is not taken."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import pytest

from faasmoe_router.control.errors import Unreachable
from faasmoe_router.control.teller import UsageTeller
from faasmoe_router.tenants.books import Books
from faasmoe_router.tenants.usage import Accounts


class Ledger:
    """Answers with what it is told to; keeps the bodies."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []

    async def usage(self, body: dict[str, Any]) -> Any:
        self.bodies.append(body)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def accounts_of(n_tokens: int) -> Accounts:
    accounts = Accounts(200.0)
    accounts.of("acme").prompt_tokens = n_tokens
    return accounts


def totals(n_tokens: int) -> dict[str, Any]:
    return {"since_s": 100.0, "tenants": {"acme": {"prompt_tokens": n_tokens, "completed": 4}}}


def tell(ledger: Ledger, books: Books, *, n_routers: int = 2, times: int = 1) -> None:
    async def run() -> None:
        teller = UsageTeller(ledger, books, n_routers=lambda: n_routers)
        for _ in range(times):
            await teller.tell()

    asyncio.run(run())


def test_what_others_used_is_the_sum_less_what_was_told() -> None:
    accounts = accounts_of(7)
    books = Books(accounts)
    assert books.whole("acme")["prompt_tokens"] == 7
    assert books.others.as_of_s is None
    ledger = Ledger(totals(10))
    tell(ledger, books)
    assert ledger.bodies[0]["book"] == accounts.book
    assert ledger.bodies[0]["tenants"]["acme"]["prompt_tokens"] == 7
    whole = books.whole("acme")
    assert (whole["prompt_tokens"], whole["completed"]) == (10, 4)
    accounts.of("acme").prompt_tokens = 9  # counts before it is told
    assert books.whole("acme")["prompt_tokens"] == 12
    assert books.others.since_s == 100.0
    assert time.time() - (books.others.as_of_s or 0.0) < 60


def test_a_tenant_without_use_here_sees_what_it_used_elsewhere() -> None:
    books = Books(Accounts(200.0))
    tell(Ledger(totals(10)), books)
    assert books.whole("acme")["prompt_tokens"] == 10
    assert set(books.whole("beta").values()) == {0}


def test_while_nobody_hears_the_last_sum_stands(caplog: pytest.LogCaptureFixture) -> None:
    accounts = accounts_of(7)
    books = Books(accounts)
    ledger = Ledger(totals(10))
    tell(ledger, books)
    ledger.answer = Unreachable("away")
    accounts.of("acme").prompt_tokens = 8
    with caplog.at_level(logging.WARNING):
        tell(ledger, books, times=3)
    assert books.whole("acme")["prompt_tokens"] == 11
    assert caplog.text.count("could not be told") == 1


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param([], id="list"),
        pytest.param({"since_s": 1.0}, id="no-tenants"),
        pytest.param({"since_s": 1.0, "tenants": {"acme": 3}}, id="no-account"),
        pytest.param({"since_s": 1.0, "tenants": {"acme": {"completed": "3"}}}, id="words"),
        pytest.param({"since_s": 1.0, "tenants": {"acme": {"completed": -1}}}, id="negative"),
        pytest.param({"since_s": float("nan"), "tenants": {}}, id="nan"),
    ],
)
def test_nonsense_is_not_taken(answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    books = Books(accounts_of(7))
    with caplog.at_level(logging.WARNING):
        tell(Ledger(answer), books)
    assert books.whole("acme")["prompt_tokens"] == 7
    assert "could not be told" in caplog.text


def test_a_lone_router_says_nothing_while_there_is_nothing_new() -> None:
    accounts = accounts_of(7)
    books = Books(accounts)
    ledger = Ledger(totals(7))

    async def run() -> None:
        teller = UsageTeller(ledger, books, n_routers=lambda: 1)
        await teller.tell()
        await teller.tell()
        assert len(ledger.bodies) == 1
        accounts.of("acme").prompt_tokens = 8
        await teller.tell()
        await teller.end()
        assert [body["ends"] for body in ledger.bodies] == [False, False, True]

    asyncio.run(run())


def test_one_of_several_asks_again_though_it_has_nothing_new() -> None:
    ledger = Ledger(totals(7))
    tell(ledger, Books(accounts_of(7)), times=3)
    assert len(ledger.bodies) == 3
