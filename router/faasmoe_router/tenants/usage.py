"""Usage of this router's tenants: tokens, requests and their share of the expert functions' cost.

The cost of each interval is attributed to tenants in proportion to the tokens that the engine
computed for them, whichever experts these tokens used. So usage reveals no routing, and the
attributed cost adds up to the total: the cost of an interval without tokens is carried over to the
next one that has some. Pure; `usage_store` persists it.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store
from faasmoe_contracts.usage import UsageRecord
from faasmoe_router.dispatch.load import LoadTotals

BYTES_PER_GB = 1e9
SOURCE_ID_BYTES = 16
FORMAT_VERSION = 1
RequestOutcome = Literal["completed", "cancelled", "failed", "limited"]
REQUEST_OUTCOMES: tuple[RequestOutcome, ...] = get_args(RequestOutcome)


@dataclass(frozen=True, slots=True)
class FunctionCost:
    """Cost of calls to expert functions.

    Attributes:
        seconds: time in flight, summed over calls, in seconds. Since a sandbox has one compute
            thread, this is an upper bound of the CPU or GPU time.
        gb_seconds: the same, each call multiplied by its function's size in GB.
    """

    seconds: float = 0.0
    gb_seconds: float = 0.0

    def __add__(self, other: FunctionCost) -> FunctionCost:
        """Return the sum of both."""
        return FunctionCost(self.seconds + other.seconds, self.gb_seconds + other.gb_seconds)

    def scaled(self, fraction: float) -> FunctionCost:
        """Return a fraction of the cost."""
        return FunctionCost(self.seconds * fraction, self.gb_seconds * fraction)


class FunctionCostMeter:
    """Converts the growing totals of a load meter to the cost since the last reading.

    Args:
        store: store that the functions belong to; gives their sizes.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._last_readings: Mapping[str, LoadTotals] = {}

    def read_delta(
        self, readings: Mapping[str, LoadTotals], specs: Mapping[str, FunctionSpec]
    ) -> FunctionCost:
        """Return the cost since the last call.

        Args:
            readings: totals of each function.
            specs: the functions of the routing table; others count without GB-seconds.
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
    """Return the size of a function's weights, in bytes."""
    layers = [store.manifest.layers[layer] for layer in spec.layers]
    return sum(len(spec.experts) * layer.expert_bytes for layer in layers)


@dataclass(slots=True)
class TenantUsage:
    """Mutable counters of one tenant.

    Attributes:
        prompt_tokens: tokens of prompts, each prompt once however many choices it has.
        generated_tokens: tokens generated.
        requests: requests by outcome: completed; cancelled by the client; failed through no fault
            of the client; limited, which were rejected by a rate limit or a full queue.
        cost: the tenant's share of the expert functions' cost.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    requests: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REQUEST_OUTCOMES, 0))
    cost: FunctionCost = field(default_factory=FunctionCost)

    def totals(self) -> UsageRecord:
        """Return the counters as an immutable record."""
        return UsageRecord(
            self.prompt_tokens,
            self.generated_tokens,
            **self.requests,
            expert_seconds=self.cost.seconds,
            expert_gb_seconds=self.cost.gb_seconds,
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of the usage file."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TenantUsage:
        """Read a JSON object; raises KeyError, TypeError or ValueError if it is invalid."""
        requests: dict[str, int] = {
            outcome: int(value["requests"].get(outcome, 0)) for outcome in REQUEST_OUTCOMES
        }
        cost = FunctionCost(float(value["cost"]["seconds"]), float(value["cost"]["gb_seconds"]))
        return cls(int(value["prompt_tokens"]), int(value["generated_tokens"]), requests, cost)


class RouterUsage:
    """Usage of all tenants through this router, former tenants included.

    Args:
        since_s: start of counting, seconds since the epoch.
        source_id: identity of these counters; None for a new one.

    Attributes:
        since_s: start of counting, seconds since the epoch.
        source_id: identity of these counters, unique over all routers and restarts.
        total_cost: cost of the expert functions, attributed or not.
    """

    def __init__(self, since_s: float, *, source_id: str | None = None) -> None:
        self.since_s = since_s
        self.source_id = source_id or secrets.token_hex(SOURCE_ID_BYTES)
        self.total_cost = FunctionCost()
        self._unattributed = FunctionCost()
        self._tenants: dict[str, TenantUsage] = {}

    def __iter__(self) -> Iterator[tuple[str, TenantUsage]]:
        """Iterate over the tenants' names and counters."""
        return iter(list(self._tenants.items()))

    def for_tenant(self, tenant: str) -> TenantUsage:
        """Return a tenant's counters; they start at zero."""
        return self._tenants.setdefault(tenant, TenantUsage())

    def attribute_cost(self, cost: FunctionCost, tokens: Mapping[str, int]) -> None:
        """Attribute an interval's cost to tenants.

        Args:
            cost: cost of the interval.
            tokens: tokens computed for each tenant in the interval.
        """
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
        """Return the JSON object of the usage file."""
        return {
            "version": FORMAT_VERSION,
            "book": self.source_id,
            "since_s": self.since_s,
            "spent": asdict(self.total_cost),
            "pending": asdict(self._unattributed),
            "tenants": {name: usage.to_json() for name, usage in self},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RouterUsage:
        """Read a JSON object; raises KeyError, TypeError or ValueError if it is invalid."""
        if value["version"] != FORMAT_VERSION:
            raise ValueError(f"version: got {value['version']!r}, expected {FORMAT_VERSION}")
        usage = cls(float(value["since_s"]), source_id=_parse_source_id(value.get("book")))
        usage.total_cost = FunctionCost(**value["spent"])
        usage._unattributed = FunctionCost(**value["pending"])
        usage._tenants = {
            str(name): TenantUsage.from_json(tenant) for name, tenant in value["tenants"].items()
        }
        return usage


def _parse_source_id(value: Any) -> str | None:
    """Return the source id of a usage file; None for files of versions without one."""
    if value is not None and not (isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value)):
        raise ValueError(f"book: got {value!r}, expected 32 hexadecimal digits")
    return value
