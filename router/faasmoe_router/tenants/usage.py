"""What expert functions cost: for how long they were in use, and how much memory they are. Pure.

The tenants' accounts: tokens, requests, and their part of what expert functions cost. Pure.

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

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store
from faasmoe_router.dispatch.load import LoadTotals

BYTES_PER_GB = 1e9


@dataclass(frozen=True, slots=True)
class FunctionCost:
    """Use of expert functions.

    Attributes:
        seconds: time that calls to functions were in flight, added up over the calls; with one
            compute thread for each sandbox, what they took of CPU or GPU at most.
        gb_seconds: the same, times the size of each call's function.
    """

    seconds: float = 0.0
    gb_seconds: float = 0.0

    def __add__(self, other: FunctionCost) -> FunctionCost:
        """Return both together."""
        return FunctionCost(self.seconds + other.seconds, self.gb_seconds + other.gb_seconds)

    def scaled(self, fraction: float) -> FunctionCost:
        """Return a part of it."""
        return FunctionCost(self.seconds * fraction, self.gb_seconds * fraction)


class FunctionCostMeter:
    """Turns the growing totals of a load meter into the cost since the last reading."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._last_readings: Mapping[str, LoadTotals] = {}

    def read_delta(
        self, readings: Mapping[str, LoadTotals], specs: Mapping[str, FunctionSpec]
    ) -> FunctionCost:
        """Return the cost since the last call.

        Args:
            now: each function's totals.
            specs: the functions that are known; others cost their time only.
        """
        total = FunctionCost()
        for name, reading in readings.items():
            last = self._last_readings.get(name, LoadTotals())
            used_s = max(0.0, reading.in_flight_s - last.in_flight_s)
            spec = specs.get(name)
            size_gb = 0.0 if spec is None else function_size_bytes(spec, self._store) / BYTES_PER_GB
            total += FunctionCost(used_s, used_s * size_gb)
        self._last_readings = readings
        return total


def function_size_bytes(spec: FunctionSpec, store: Store) -> int:
    """Return the bytes of a function's weights."""
    layers = [store.manifest.layers[layer] for layer in spec.layers]
    return sum(len(spec.experts) * layer.expert_bytes for layer in layers)


LEDGER_ID_BYTES = 16
RequestOutcome = Literal["completed", "cancelled", "failed", "limited"]
REQUEST_OUTCOMES: tuple[RequestOutcome, ...] = get_args(RequestOutcome)


@dataclass(slots=True)
class TenantUsage:
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
    requests: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REQUEST_OUTCOMES, 0))
    cost: FunctionCost = field(default_factory=FunctionCost)

    def totals(self) -> dict[str, float]:
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
    def from_json(cls, value: Mapping[str, Any]) -> TenantUsage:
        """Read an account; raises KeyError, TypeError or ValueError if it is none."""
        requests: dict[str, int] = {
            outcome: int(value["requests"].get(outcome, 0)) for outcome in REQUEST_OUTCOMES
        }
        cost = FunctionCost(float(value["cost"]["seconds"]), float(value["cost"]["gb_seconds"]))
        return cls(int(value["prompt_tokens"]), int(value["generated_tokens"]), requests, cost)


class RouterUsage:
    """All tenants' accounts, the former ones' too.

    Attributes:
        spent: what expert functions have cost, all together.
        since_s: when the accounts were opened, seconds since the epoch.
        book: their name, which no other router's have, at any time.
    """

    def __init__(self, since_s: float, *, ledger_id: str | None = None) -> None:
        self.since_s = since_s
        self.ledger_id = ledger_id or secrets.token_hex(LEDGER_ID_BYTES)
        self.total_cost = FunctionCost()
        self._unattributed = FunctionCost()
        self._tenants: dict[str, TenantUsage] = {}

    def __iter__(self) -> Iterator[tuple[str, TenantUsage]]:
        """Iterate over the tenants' names and accounts."""
        return iter(list(self._tenants.items()))

    def for_tenant(self, tenant: str) -> TenantUsage:
        """Return a tenant's account, a new one if it has none."""
        return self._tenants.setdefault(tenant, TenantUsage())

    def attribute_cost(self, cost: FunctionCost, tokens: Mapping[str, int]) -> None:
        """Add an interval's cost to the accounts of those for whom tokens were computed in it."""
        self.total_cost += cost
        to_attribute = self._unattributed + cost
        n_tokens = sum(tokens.values())
        if not n_tokens:
            self._unattributed = to_attribute
            return
        self._unattributed = FunctionCost()
        for tenant, n in tokens.items():
            self.for_tenant(tenant).cost += to_attribute.scaled(n / n_tokens)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of all accounts."""
        return {
            "version": 1,
            "book": self.ledger_id,
            "since_s": self.since_s,
            "spent": asdict(self.total_cost),
            "pending": asdict(self._unattributed),
            "tenants": {name: account.to_json() for name, account in self},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RouterUsage:
        """Read accounts; raises KeyError, TypeError or ValueError if they are none."""
        if value["version"] != 1:
            raise ValueError(f"version: got {value['version']!r}, expected 1")
        usage = cls(float(value["since_s"]), ledger_id=_parse_ledger_id(value.get("book")))
        usage.total_cost = FunctionCost(**value["spent"])
        usage._unattributed = FunctionCost(**value["pending"])
        usage._tenants = {
            str(name): TenantUsage.from_json(account) for name, account in value["tenants"].items()
        }
        return usage


def _parse_ledger_id(value: Any) -> str | None:
    """Return a book's name as it was kept; None for accounts from before they had one."""
    if value is not None and not (isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value)):
        raise ValueError(f"book: got {value!r}, expected 32 hexadecimal digits")
    return value
