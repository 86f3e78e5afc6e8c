"""Messages between routers and control plane: routing table stream, load reports, activations.

The table stream is newline-delimited JSON: a snapshot, then changes of addresses, with pings in
between. A router that reconnects names the version that it has and gets only what changed since.
Bounds that both sides must agree on are constants of this module; usage reports are in `usage`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from faasmoe_contracts.json_reader import MAX_COUNT, ContractError, ObjectReader, parse_json
from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable
from faasmoe_contracts.text import short_repr
from faasmoe_contracts.usage import check_tenant_name

MAX_LINE_BYTES = 32 << 20
"""Longest line of the table stream."""
MAX_TENANTS = 64
"""Tenants of one model."""
MAX_FUNCTION_NAME = 64
"""Characters of a function id."""
MAX_ACTIVATED_FUNCTIONS = 1_000_000
"""Functions in one activation request."""
MAX_INTERVAL_S = 60.0
"""Longest interval of a load report."""
MAX_CONCURRENCY = 1e9
ROUTER_NAME = re.compile("[A-Za-z0-9._-]{1,64}")
_ROUTER_NAME_TEXT = "1 to 64 letters, digits, dots, dashes and underscores"


@dataclass(frozen=True, slots=True)
class TableVersion:
    """A position in the table stream, from which a router can resume.

    Attributes:
        epoch: identity of one run of the control process.
        version: the table's version in that run.
    """

    epoch: str | int
    version: int


@dataclass(frozen=True, slots=True)
class TableSnapshot:
    """The whole table."""

    version: TableVersion
    table: RoutingTable

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {
            "kind": "snapshot",
            "epoch": self.version.epoch,
            "version": self.version.version,
            "table": self.table.to_json(),
        }


@dataclass(frozen=True, slots=True)
class TableUpdate:
    """New addresses of some functions; the others keep theirs.

    Attributes:
        version: the table's version after this update.
        addresses: `host:port` of the replicas, by function id.
    """

    version: int
    addresses: Mapping[str, tuple[str, ...]]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        functions = [
            {"id": name, "addresses": list(addresses)} for name, addresses in self.addresses.items()
        ]
        return {"kind": "change", "version": self.version, "functions": functions}


@dataclass(frozen=True, slots=True)
class Ping:
    """A keep-alive. Messages of an unknown kind are read as pings.

    Attributes:
        version: the table's version; None if it was not read.
    """

    version: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        return {"kind": "ping", "version": self.version}


TableMessage = TableSnapshot | TableUpdate | Ping


def parse_table_message(line: bytes) -> TableMessage:
    """Read one line of the table stream.

    Raises:
        ContractError: a field is invalid.
        RoutingTableError: the table or an address in it is invalid.
    """
    value = parse_json(line, field="line")
    reader = ObjectReader(value, field="line")
    kind = reader.text("kind", pattern=re.compile(".*", re.DOTALL), expected="a string")
    if kind == "snapshot":
        version = TableVersion(_read_epoch(reader), reader.count("version"))
        return TableSnapshot(version, RoutingTable.from_json(reader.mapping("table")))
    if kind == "change":
        return TableUpdate(reader.count("version"), dict(_read_addresses(reader)))
    return Ping()


def _read_epoch(reader: ObjectReader) -> str | int:
    epoch = reader.get("epoch")
    if not isinstance(epoch, str | int) or isinstance(epoch, bool) or epoch == "":
        raise reader.error("epoch", "a name or a number")
    return epoch


def _read_addresses(reader: ObjectReader) -> Iterator[tuple[str, tuple[str, ...]]]:
    for function in reader.array("functions"):
        if not isinstance(function, dict):
            raise ContractError("functions", short_repr(function), "objects")
        # An update omits the experts, which never change; the rest is checked as in a table.
        entry = FunctionEndpoints.from_json({**function, "layers": [0], "experts": [0]})
        yield entry.spec.id, entry.addresses


class LineDecoder:
    """Splits a stream of bytes into lines of at most `max_bytes` bytes."""

    def __init__(self, max_bytes: int = MAX_LINE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self._n_bytes = 0

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the lines that the chunk completes; raises ContractError if one is too long."""
        *segments, partial = chunk.split(b"\n")
        for segment in segments:
            self._append(segment)
            line, self._parts, self._n_bytes = b"".join(self._parts), [], 0
            if line:
                yield line
        self._append(partial)

    def _append(self, part: bytes) -> None:
        self._n_bytes += len(part)
        if self._n_bytes > self._max_bytes:
            limit = f"at most {self._max_bytes} bytes"
            raise ContractError("line", f"more than {self._max_bytes} bytes", limit)
        if part:
            self._parts.append(part)


FUNCTION_LOAD_FIELDS = ("concurrency", "calls", "rows")


@dataclass(frozen=True, slots=True)
class FunctionLoad:
    """One function's load over an interval.

    Attributes:
        concurrency: time average of the calls in flight, queued ones included.
        calls: calls started.
        rows: rows of hidden states in these calls.
    """

    concurrency: float
    calls: int = 0
    rows: int = 0

    @property
    def is_idle(self) -> bool:
        """Whether no call was in flight or started."""
        return not (self.concurrency or self.calls)

    def to_json(self) -> dict[str, float]:
        """Return the JSON object."""
        return {"concurrency": self.concurrency, "calls": self.calls, "rows": self.rows}

    @classmethod
    def from_json(cls, value: object, *, path: str) -> FunctionLoad:
        """Read a JSON object whose path in error messages is `path`; raises ContractError."""
        if (
            type(value) is dict and len(value) == 3
        ):  # the usual form in one step: thousands a second
            concurrency, calls, rows = map(value.get, FUNCTION_LOAD_FIELDS)
            if (
                type(concurrency) is float
                and type(calls) is type(rows) is int
                and 0 <= concurrency <= MAX_CONCURRENCY
                and 0 <= calls <= MAX_COUNT
                and 0 <= rows <= MAX_COUNT
            ):
                return cls(concurrency, calls, rows)
        reader = ObjectReader(value, field=path, path=path, known=FUNCTION_LOAD_FIELDS)
        concurrency = reader.number("concurrency", maximum=MAX_CONCURRENCY)
        return cls(concurrency, reader.count("calls"), reader.count("rows"))


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What one router reports every second: the body of POST /v1/load.

    Attributes:
        router: the router's name, new at every start.
        functions: loads by function id; functions without load are omitted.
        queued: calls and requests that wait for a function; `held` on the wire.
        n_local_calls: calls that the router computed itself in the interval; `local` on the wire.
        tenant_key_counts: number of API keys of each tenant; None without tenants; `tenants` on
            the wire.
        interval_s: length of the interval, in seconds.
        sent_at_s: the router's clock, seconds since the epoch.
    """

    router: str
    functions: Mapping[str, FunctionLoad] = field(default_factory=dict)
    queued: int = 0
    n_local_calls: int = 0
    tenant_key_counts: Mapping[str, int] | None = None
    interval_s: float = 1.0
    sent_at_s: float = 0.0

    @property
    def has_load(self) -> bool:
        """Whether any call is in flight or queued."""
        return self.queued > 0 or any(load.concurrency > 0 for load in self.functions.values())

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        body: dict[str, Any] = {
            "router": self.router,
            "sent_at_s": self.sent_at_s,
            "interval_s": self.interval_s,
            "functions": {name: load.to_json() for name, load in self.functions.items()},
            "held": self.queued,
            "local": self.n_local_calls,
        }
        if self.tenant_key_counts is not None:
            body["tenants"] = dict(self.tenant_key_counts)
        return body

    @classmethod
    def from_json(cls, value: object) -> LoadReport:
        """Read a JSON object; raises ContractError."""
        reader = ObjectReader(value, known=_LOAD_FIELDS)
        router = _read_router_name(reader)
        sent_at_s = _read_clock(reader)
        interval_s = reader.number("interval_s", maximum=MAX_INTERVAL_S)
        if not interval_s:
            raise reader.error("interval_s", f"more than 0 and at most {MAX_INTERVAL_S:g}")
        return cls(
            router,
            {
                name: FunctionLoad.from_json(load, path=f"functions.{name}")
                for name, load in reader.mapping("functions").items()
                if _check_function_name(name, field="functions")
            },
            queued=reader.count("held"),
            n_local_calls=reader.count("local"),
            tenant_key_counts=_read_key_counts(reader) if "tenants" in reader else None,
            interval_s=interval_s,
            sent_at_s=sent_at_s,
        )


_LOAD_FIELDS = ("router", "sent_at_s", "interval_s", "functions", "held", "local", "tenants")


@dataclass(frozen=True, slots=True)
class ActivationRequest:
    """Functions that requests of one router wait for: the body of POST /v1/wake.

    Attributes:
        router: the router's name.
        functions: function ids, at least one.
        sent_at_s: the router's clock, seconds since the epoch.
    """

    router: str
    functions: tuple[str, ...]
    sent_at_s: float

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object."""
        functions = list(self.functions)
        return {"router": self.router, "sent_at_s": self.sent_at_s, "functions": functions}

    @classmethod
    def from_json(cls, value: object) -> ActivationRequest:
        """Read a JSON object; raises ContractError."""
        reader = ObjectReader(value, known=("router", "sent_at_s", "functions"))
        router, sent_at_s = _read_router_name(reader), _read_clock(reader)
        functions = reader.array("functions", max_length=MAX_ACTIVATED_FUNCTIONS)
        if not functions:
            raise reader.error("functions", "at least one function")
        names = []
        for index, name in enumerate(functions):
            if not isinstance(name, str):
                raise ContractError(f"functions.{index}", short_repr(name), "a string")
            _check_function_name(name, field=f"functions.{index}")
            names.append(name)
        return cls(router, tuple(names), sent_at_s)


def _read_router_name(reader: ObjectReader) -> str:
    return reader.text("router", pattern=ROUTER_NAME, expected=_ROUTER_NAME_TEXT)


def _read_clock(reader: ObjectReader) -> float:
    return reader.number("sent_at_s", minimum=-sys.float_info.max)


def _read_key_counts(reader: ObjectReader) -> dict[str, int]:
    tenants = reader.mapping("tenants", max_length=MAX_TENANTS)
    counts = ObjectReader(tenants, path="tenants")
    for name in tenants:
        check_tenant_name(name)
    return {name: counts.count(name) for name in tenants}


def _check_function_name(name: str, *, field: str) -> bool:
    """Return True for a name of at most MAX_FUNCTION_NAME characters; raises ContractError."""
    if len(name) > MAX_FUNCTION_NAME:
        raise ContractError(field, short_repr(name), f"at most {MAX_FUNCTION_NAME} characters")
    return True
