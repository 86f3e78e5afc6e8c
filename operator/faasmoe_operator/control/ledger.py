"""What each tenant has used over all routers, from the books that the routers keep. Pure.

A router tells the totals of its own book, again and again; what is more in them than when they were
told last is added to the tenants' accounts. What is told twice counts once, and what was told and
lost is in the totals that are told next. Tokens and sums only: nothing of which experts were used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

MAX_ACCOUNTS = 1024
MAX_BOOKS = 256


@dataclass(frozen=True, slots=True)
class Use:
    """What one tenant has used.

    Attributes:
        prompt_tokens: tokens of prompts.
        generated_tokens: tokens generated.
        completed: requests that ended well.
        cancelled: requests that their clients gave up.
        failed: requests that could not be finished.
        limited: requests that were refused for want of allowance or of room.
        expert_seconds: the tenant's part of the time that functions were in use.
        expert_gb_seconds: the same, times the functions' sizes.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    completed: int = 0
    cancelled: int = 0
    failed: int = 0
    limited: int = 0
    expert_seconds: float = 0.0
    expert_gb_seconds: float = 0.0

    def __add__(self, other: Use) -> Use:
        """Return both together."""
        return self._with(other, lambda mine, others: mine + others)

    @property
    def numbers(self) -> tuple[Any, ...]:
        """The fields, in their order."""
        return tuple(getattr(self, name) for name in FIELDS)

    def beyond(self, before: Use) -> Use:
        """Return what is more here than before; a field that has shrunk is no more."""
        return self._with(before, lambda now, then: max(now - then, 0))

    def at_least(self, before: Use) -> Use:
        """Return the larger of each field."""
        return self._with(before, max)

    def _with(self, other: Use, combine: Callable[[Any, Any], Any]) -> Use:
        return Use(*map(combine, self.numbers, other.numbers))


@dataclass(frozen=True, slots=True)
class Statement:
    """What a router says of its book.

    Attributes:
        book: the book's name, which no other book has.
        since_s: when it was opened, seconds since the epoch.
        tenants: its totals.
        ends: whether the router ends.
    """

    book: str
    since_s: float
    tenants: Mapping[str, Use]
    ends: bool = False


FIELDS = tuple(field.name for field in fields(Use))


class Ledger:
    """The tenants' accounts, and what each router's book said last.

    Attributes:
        since_s: when the first of the books was opened, seconds since the epoch.
        accounts: what each tenant has used.
        books: what each book said of each tenant, the one that was told last at the end.
        n_tellings: how often something new was told.
        n_endings: how often a router told that it ends.
    """

    def __init__(
        self,
        since_s: float,
        *,
        accounts: Mapping[str, Use] | None = None,
        books: Mapping[str, Mapping[str, Use]] | None = None,
    ) -> None:
        self.since_s = since_s
        self.accounts = dict(accounts or {})
        self.books: dict[str, Mapping[str, Use]] = dict(books or {})
        self.n_tellings = 0
        self.n_endings = 0

    def has_room_for(self, tenants: Iterable[str]) -> bool:
        """Return whether there may be accounts for these tenants too."""
        return len(self.accounts.keys() | set(tenants)) <= MAX_ACCOUNTS

    def take(self, said: Statement) -> None:
        """Take what a book says."""
        before = self.books.pop(said.book, {})
        new = {name: use.beyond(before.get(name, Use())) for name, use in said.tenants.items()}
        for name, use in new.items():
            self.accounts[name] = self.accounts.get(name, Use()) + use
        grown = {name: use.at_least(before.get(name, Use())) for name, use in said.tenants.items()}
        self.books[said.book] = {**before, **grown}
        self.since_s = min(self.since_s, said.since_s)
        self.n_tellings += any(use != Use() for use in new.values())
        self.n_endings += said.ends
        while len(self.books) > MAX_BOOKS:
            del self.books[next(iter(self.books))]
