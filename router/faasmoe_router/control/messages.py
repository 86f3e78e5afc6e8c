"""The table stream's messages: bytes to lines, lines to values. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable, RoutingTableError
from faasmoe_router.errors import ControlProtocolError

MAX_LINE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class TableVersion:
    """Where a router is in the stream: what it resumes from.

    Attributes:
        epoch: names one life of the control process.
        version: the table's version in it.
    """

    epoch: str | int
    version: int


@dataclass(frozen=True, slots=True)
class TableSnapshot:
    """The whole table."""

    version: TableVersion
    table: RoutingTable


@dataclass(frozen=True, slots=True)
class TableUpdate:
    """Other addresses for some functions."""

    version: int
    addresses: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Ping:
    """Nothing but a sign of life; also any message of a kind that is not known here."""


TableMessage = TableSnapshot | TableUpdate | Ping


class LineDecoder:
    """Cuts a stream of bytes into lines of at most `max_bytes`."""

    def __init__(self, max_bytes: int = MAX_LINE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self._n_bytes = 0

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the lines that are whole now; raises Garbage at one that is too long."""
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
            raise ControlProtocolError(f"line: got more than {self._max_bytes} bytes")
        if part:
            self._parts.append(part)


def parse_message(line: bytes) -> TableMessage:
    """Read one line of the stream; raises Garbage that names the field."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ControlProtocolError(f"line: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ControlProtocolError(f"line: got {type(value).__name__}, expected an object")
    kind = value.get("kind")
    try:
        if kind == "snapshot":
            version = TableVersion(_parse_epoch(value), _parse_version(value))
            return TableSnapshot(version, _parse_table(value))
        if kind == "change":
            return TableUpdate(_parse_version(value), dict(_parse_addresses(value)))
    except RoutingTableError as error:
        raise ControlProtocolError(str(error)) from error
    if not isinstance(kind, str):
        raise ControlProtocolError(f"kind: got {kind!r}, expected a string")
    return Ping()


def _parse_epoch(value: Mapping[str, Any]) -> str | int:
    epoch = value.get("epoch")
    if not isinstance(epoch, str | int) or isinstance(epoch, bool) or epoch == "":
        raise ControlProtocolError(f"epoch: got {epoch!r}, expected a name or a number")
    return epoch


def _parse_version(value: Mapping[str, Any]) -> int:
    version = value.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 0:
        raise ControlProtocolError(f"version: got {version!r}, expected a number of 0 or more")
    return version


def _parse_table(value: Mapping[str, Any]) -> RoutingTable:
    table = value.get("table")
    if not isinstance(table, dict):
        raise ControlProtocolError(f"table: got {type(table).__name__}, expected an object")
    return RoutingTable.from_json(table)


def _parse_addresses(value: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    functions = value.get("functions")
    if not isinstance(functions, list):
        raise ControlProtocolError(f"functions: got {type(functions).__name__}, expected a list")
    for function in functions:
        if not isinstance(function, dict):
            raise ControlProtocolError(
                f"functions: got {type(function).__name__}, expected objects"
            )
        # A change leaves the experts out: they stay. Id and addresses are checked as in a table.
        entry = FunctionEndpoints.from_json({**function, "layers": [0], "experts": [0]})
        yield entry.spec.id, entry.addresses
