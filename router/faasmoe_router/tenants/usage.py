"""The tenants' accounts: tokens, requests, and their part of what expert functions cost. Pure.

What functions cost is shared out by interval: among the tenants in proportion to the tokens that
the engine computed for each in it, whichever experts these tokens went to. An account tells nothing
of routing, and what is shared out sums to what was spent: the cost of an interval without tokens
goes with the next one that has some.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from faasmoe_router.tenants.costs import Cost

BOOK_BYTES = 16
Outcome = Literal["completed", "cancelled", "failed", "limited"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(slots=True)
class Account:
    """What one tenant has used.

    Attributes:
        prompt_tokens: tokens of prompts, each prompt once however many choices it has.
        generated_tokens: tokens generated.
        requests: requests by outcome: completed; cancelled by their clients; failed by our fault;
            limited, which are those refused for want of the tenant's allowance or of room.
        cost: its part of what expert functions cost.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    requests: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    cost: Cost = field(default_factory=Cost)

    def statement(self) -> dict[str, float]:
        """Return the account as numbers that can be added up over routers."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
            **self.requests,
            "expert_seconds": self.cost.seconds,
            "expert_gb_seconds": self.cost.gb_seconds,
        }

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this account."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Account:
        """Read an account; raises KeyError, TypeError or ValueError if it is none."""
        requests: dict[str, int] = {
            outcome: int(value["requests"].get(outcome, 0)) for outcome in OUTCOMES
        }
        cost = Cost(float(value["cost"]["seconds"]), float(value["cost"]["gb_seconds"]))
        return cls(int(value["prompt_tokens"]), int(value["generated_tokens"]), requests, cost)


class Accounts:
    """All tenants' accounts, the former ones' too.

    Attributes:
        spent: what expert functions have cost, all together.
        since_s: when the accounts were opened, seconds since the epoch.
        book: their name, which no other router's have, at any time.
    """

    def __init__(self, since_s: float, *, book: str | None = None) -> None:
        self.since_s = since_s
        self.book = book or secrets.token_hex(BOOK_BYTES)
        self.spent = Cost()
        self._pending = Cost()
        self._accounts: dict[str, Account] = {}

    def __iter__(self) -> Iterator[tuple[str, Account]]:
        """Iterate over the tenants' names and accounts."""
        return iter(list(self._accounts.items()))

    def of(self, tenant: str) -> Account:
        """Return a tenant's account, a new one if it has none."""
        return self._accounts.setdefault(tenant, Account())

    def share_out(self, cost: Cost, tokens: Mapping[str, int]) -> None:
        """Add an interval's cost to the accounts of those for whom tokens were computed in it."""
        self.spent += cost
        whole = self._pending + cost
        n_tokens = sum(tokens.values())
        if not n_tokens:
            self._pending = whole
            return
        self._pending = Cost()
        for tenant, n in tokens.items():
            self.of(tenant).cost += whole.part(n / n_tokens)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of all accounts."""
        return {
            "version": 1,
            "book": self.book,
            "since_s": self.since_s,
            "spent": asdict(self.spent),
            "pending": asdict(self._pending),
            "tenants": {name: account.to_json() for name, account in self},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Accounts:
        """Read accounts; raises KeyError, TypeError or ValueError if they are none."""
        if value["version"] != 1:
            raise ValueError(f"version: got {value['version']!r}, expected 1")
        accounts = cls(float(value["since_s"]), book=_book(value.get("book")))
        accounts.spent = Cost(**value["spent"])
        accounts._pending = Cost(**value["pending"])
        accounts._accounts = {
            str(name): Account.from_json(account) for name, account in value["tenants"].items()
        }
        return accounts


def _book(name: Any) -> str | None:
    """Return a book's name as it was kept; None for accounts from before they had one."""
    if name is not None and not (isinstance(name, str) and re.fullmatch("[0-9a-f]{32}", name)):
        raise ValueError(f"book: got {name!r}, expected 32 hexadecimal digits")
    return name
