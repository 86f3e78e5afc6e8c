"""The tenants' accounts: tokens, requests, and their part of what expert functions cost. Pure.

What functions cost is shared out by interval: among the tenants in proportion to the tokens that
the engine computed for each in it, whichever experts these tokens went to. An account tells nothing
of routing, and what is shared out sums to what was spent: the cost of an interval without tokens
goes with the next one that has some.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from faasmoe_router.tenants.costs import Cost

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
    """

    def __init__(self, since_s: float) -> None:
        self.since_s = since_s
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
        accounts = cls(float(value["since_s"]))
        accounts.spent = Cost(**value["spent"])
        accounts._pending = Cost(**value["pending"])
        accounts._accounts = {
            str(name): Account.from_json(account) for name, account in value["tenants"].items()
        }
        return accounts
