"""Usage accounting between routers and control plane: what each tenant has used.

Routers report the totals of their counters periodically, and the control plane responds with the
totals over all routers. Totals rather than increments make a lost report harmless: the next one
contains it. Records are sums of tokens, requests and seconds; they name no expert function.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from faasmoe_contracts.json_reader import (
    MAX_COUNT,
    ContractError,
    ObjectReader,
    require_finite,
)
from faasmoe_contracts.text import short_repr

MAX_TENANTS_IN_LEDGER = 1024
"""Tenants in one report, and tenants whose usage the control plane keeps."""
TENANT_NAME = re.compile("[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")
_SOURCE_ID = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """What one tenant has used.

    Attributes:
        prompt_tokens: tokens of prompts, each prompt once however many choices it has.
        generated_tokens: tokens generated.
        completed: requests that finished.
        cancelled: requests that their clients cancelled.
        failed: requests that failed through no fault of the client.
        limited: requests rejected by a rate limit or a full queue.
        expert_seconds: the tenant's share of the time that calls to expert functions were in
            flight, in seconds.
        expert_gb_seconds: the same, each call multiplied by its function's size in GB.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    completed: int = 0
    cancelled: int = 0
    failed: int = 0
    limited: int = 0
    expert_seconds: float = 0.0
    expert_gb_seconds: float = 0.0

    def __add__(self, other: UsageRecord) -> UsageRecord:
        """Return the sum of each field."""
        return self._combine(other, lambda mine, others: mine + others)

    def minus(self, other: UsageRecord) -> UsageRecord:
        """Return the difference of each field, 0 where it would be negative."""
        return self._combine(other, lambda mine, others: max(mine - others, 0))

    def maximum(self, other: UsageRecord) -> UsageRecord:
        """Return the larger value of each field."""
        return self._combine(other, max)

    @property
    def values(self) -> tuple[Any, ...]:
        """The fields' values in the order of USAGE_FIELDS."""
        return tuple(getattr(self, name) for name in USAGE_FIELDS)

    def to_json(self) -> dict[str, float]:
        """Return the JSON object."""
        return dict(zip(USAGE_FIELDS, self.values, strict=True))

    @classmethod
    def from_json(cls, value: object, *, path: str = "") -> UsageRecord:
        """Read a JSON object that has every field and no other.

        Args:
            value: the parsed JSON value.
            path: path of the record in error messages.

        Raises:
            ContractError: a field is missing, unknown or invalid.
        """
        reader = ObjectReader(value, field=path or "usage", path=path, known=USAGE_FIELDS)
        values: dict[str, Any] = {name: reader.count(name) for name in _COUNT_FIELDS}
        values |= {name: reader.number(name, maximum=MAX_COUNT) for name in _COST_FIELDS}
        return cls(**values)

    def _combine(self, other: UsageRecord, combine: Callable[[Any, Any], Any]) -> UsageRecord:
        return UsageRecord(*map(combine, self.values, other.values))


USAGE_FIELDS = tuple(field.name for field in fields(UsageRecord))
_COST_FIELDS = ("expert_seconds", "expert_gb_seconds")
_COUNT_FIELDS = tuple(name for name in USAGE_FIELDS if name not in _COST_FIELDS)


@dataclass(frozen=True, slots=True)
class UsageReport:
    """A router's own totals: the body of POST /v1/usage.

    Attributes:
        source_id: identity of the router's counters, 32 hexadecimal digits, unique over all
            routers and restarts; `book` on the wire.
        since_s: start of counting, seconds since the epoch.
        tenants: totals by tenant.
        is_final: whether the router shuts down after this report; `ends` on the wire.
    """

    source_id: str
    since_s: float
    tenants: Mapping[str, UsageRecord]
    is_final: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {
            "book": self.source_id,
            "since_s": self.since_s,
            "ends": self.is_final,
            "tenants": {name: record.to_json() for name, record in self.tenants.items()},
        }

    @classmethod
    def from_json(cls, value: object) -> UsageReport:
        """Read a JSON object; raises ContractError."""
        reader = ObjectReader(value, known=("book", "since_s", "ends", "tenants"))
        source_id = reader.text("book", pattern=_SOURCE_ID, expected="32 hexadecimal digits")
        since_s = reader.number("since_s", maximum=MAX_COUNT)
        is_final = reader.flag("ends", default=False)
        tenants = {}
        for name, record in reader.mapping("tenants", max_length=MAX_TENANTS_IN_LEDGER).items():
            check_tenant_name(name)
            tenants[name] = UsageRecord.from_json(record, path=f"tenants.{name}")
        return cls(source_id, since_s, tenants, is_final)


@dataclass(frozen=True, slots=True)
class ClusterTotals:
    """Usage over all routers: the response of POST /v1/usage.

    Attributes:
        since_s: start of counting of the oldest report, seconds since the epoch.
        tenants: totals by tenant.
    """

    since_s: float
    tenants: Mapping[str, UsageRecord]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        tenants = {name: record.to_json() for name, record in self.tenants.items()}
        return {"since_s": self.since_s, "tenants": tenants}

    @classmethod
    def from_json(cls, value: object) -> ClusterTotals:
        """Read a JSON object; raises ContractError.

        Router and control plane are upgraded one after the other, so a record may lack fields,
        which count as 0, or have unknown ones, which are ignored.
        """
        reader = ObjectReader(value, field="usage")
        since_s = reader.number("since_s")
        tenants = {}
        for name, totals in reader.mapping("tenants").items():
            path = f"tenants.{name}"
            if not isinstance(totals, dict):
                raise reader.error("tenants", "an object for each tenant")
            present: dict[str, Any] = {
                key: require_finite(number, field=f"{path}.{key}")
                for key, number in totals.items()
                if key in USAGE_FIELDS
            }
            tenants[name] = UsageRecord(**present)
        return cls(since_s, tenants)


def check_tenant_name(name: str) -> None:
    """Raise ContractError unless a key of `tenants` is a DNS label of at most 63 characters."""
    if not TENANT_NAME.fullmatch(name):
        expected = "names of at most 63 lower-case letters, digits and dashes"
        raise ContractError("tenants", short_repr(name), expected)
