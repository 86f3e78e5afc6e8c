"""What several gateways and the authority of their tenants' limits tell each other.

A gateway writes one JSON line for each renewal; the authority answers each with one line. Leases
are `token_leases`'. Beside them goes what tenants used in the day and the month, so that budgets
hold over all gateways: each tells what it has counted, and gets what the others have. Both tell of
tenants only what has changed since the connection's last line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field
from typing import Self

from faasmoe_contracts.json_reader import ContractError, ObjectReader, parse_json
from faasmoe_contracts.tenant_usage import Usage
from faasmoe_contracts.token_leases import LeaseGrant, LeaseRequest

RENEW_S = 0.4  # less than WITHHELD_AFTER_S
MAX_LINE_BYTES = 8 << 20
MAX_ENTRIES = 1 << 16
_NAME = re.compile(r"[^\n]{1,512}")
_DAY = re.compile(r"\d{4}-\d{2}-\d{2}")


def bucket_name(tenant: str, limit: str) -> str:
    """Return the name of a limit's bucket."""
    return f"{tenant}/{limit}"


@dataclass(frozen=True, slots=True)
class PeriodUsage:
    """What a tenant used in the current day and month.

    Attributes:
        day: the day in UTC, such as 2026-11-29.
        in_day: used on that day.
        in_month: used in its month.
    """

    day: str
    in_day: Usage
    in_month: Usage

    @classmethod
    def from_json(cls, value: object, *, path: str) -> Self:
        """Read a value; raises ContractError."""
        reader = ObjectReader(value, field=path, path=path, known=("day", "in_day", "in_month"))
        return cls(
            reader.text("day", pattern=_DAY, expected="a day such as 2026-11-29"),
            _read_usage(reader.get("in_day"), path=f"{path}.in_day"),
            _read_usage(reader.get("in_month"), path=f"{path}.in_month"),
        )


@dataclass(frozen=True, slots=True)
class LeaseReport:
    """What a gateway asks for, and what its tenants used.

    Attributes:
        holder: the gateway's name, the same after a restart.
        requests: what it asks for, by bucket.
        usage: usage by tenant.
        run: name of what counts that usage, a process or files that outlive it; empty for the
            gateway's.
    """

    holder: str
    requests: Mapping[str, LeaseRequest]
    usage: Mapping[str, PeriodUsage] = field(default_factory=dict)
    run: str = ""

    def dumps(self) -> bytes:
        """Return the line."""
        value = {
            "holder": self.holder,
            "requests": {name: astuple(request) for name, request in self.requests.items()},
            "usage": {name: asdict(usage) for name, usage in self.usage.items()},
            "run": self.run or self.holder,
        }
        return json.dumps(value).encode() + b"\n"

    @classmethod
    def loads(cls, line: bytes) -> Self:
        """Read a line; raises ContractError."""
        known = ("holder", "requests", "usage", "run")
        reader = ObjectReader(parse_json(line, field="report"), field="report", known=known)
        requests = {}
        for name, value in reader.mapping("requests", max_length=MAX_ENTRIES).items():
            sequence, confirmed, *amounts = _numbers(value, 6, path=f"requests.{name}")
            requests[name] = LeaseRequest(int(sequence), int(confirmed), *amounts)
        usage = reader.mapping("usage", max_length=MAX_ENTRIES).items()
        return cls(
            reader.text("holder", pattern=_NAME, expected="a name"),
            requests,
            {name: PeriodUsage.from_json(used, path=f"usage.{name}") for name, used in usage},
            reader.text("run", pattern=_NAME, expected="a name"),
        )


@dataclass(frozen=True, slots=True)
class LeaseAnswer:
    """What the authority answers.

    Attributes:
        grants: what it grants, by bucket; none for a request that a later one has overtaken.
        levels: tokens that it has left, by bucket.
        usage: what tenants used through the other gateways, by tenant.
    """

    grants: Mapping[str, LeaseGrant]
    levels: Mapping[str, float]
    usage: Mapping[str, PeriodUsage] = field(default_factory=dict)

    def dumps(self) -> bytes:
        """Return the line."""
        value = {
            "grants": {name: astuple(grant) for name, grant in self.grants.items()},
            "levels": dict(self.levels),
            "usage": {name: asdict(usage) for name, usage in self.usage.items()},
        }
        return json.dumps(value).encode() + b"\n"

    @classmethod
    def loads(cls, line: bytes) -> Self:
        """Read a line; raises ContractError."""
        known = ("grants", "levels", "usage")
        reader = ObjectReader(parse_json(line, field="answer"), field="answer", known=known)
        grants = {}
        for name, value in reader.mapping("grants", max_length=MAX_ENTRIES).items():
            sequence, tokens, share = _numbers(value, 3, path=f"grants.{name}")
            grants[name] = LeaseGrant(int(sequence), tokens, share)
        levels = ObjectReader(reader.get("levels"), field="levels", path="levels")
        names = reader.mapping("levels", max_length=MAX_ENTRIES)
        usage = reader.mapping("usage", max_length=MAX_ENTRIES).items()
        return cls(
            grants,
            {name: levels.number(name) for name in names},
            {name: PeriodUsage.from_json(used, path=f"usage.{name}") for name, used in usage},
        )


def _numbers(value: object, count: int, *, path: str) -> list[float]:
    """Return a list of finite numbers of 0 or more."""
    found = ObjectReader({"list": value}, field=path, path=path).array("list", max_length=count)
    if len(found) != count:
        raise ContractError(path, f"{len(found)} entries", str(count))
    numbers = ObjectReader({str(i): n for i, n in enumerate(found)}, field=path, path=path)
    return [numbers.number(str(index)) for index in range(count)]


def _read_usage(value: object, *, path: str) -> Usage:
    known = ("requests", "input_tokens", "output_tokens", "money")
    reader = ObjectReader(value, field=path, path=path, known=known)
    requests, inputs, outputs = (reader.count(name) for name in known[:3])
    return Usage(requests, inputs, outputs, reader.number("money"))
