"""The table stream's messages: bytes to lines, lines to values. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from faasmoe_expert.table import FunctionEntry, FunctionTable, TableError
from faasmoe_router.control.errors import Garbage

MAX_LINE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Where a router is in the stream: what it resumes from.

    Attributes:
        epoch: names one life of the control process.
        version: the table's version in it.
    """

    epoch: str | int
    version: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole table."""

    place: Place
    table: FunctionTable


@dataclass(frozen=True, slots=True)
class Change:
    """Other addresses for some functions."""

    version: int
    addresses: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Ping:
    """Nothing but a sign of life; also any message of a kind that is not known here."""


Message = Snapshot | Change | Ping


class Lines:
    """Cuts a stream of bytes into lines of at most `max_bytes`."""

    def __init__(self, max_bytes: int = MAX_LINE_BYTES) -> None:
        self._max_bytes = max_bytes
        self._parts: list[bytes] = []
        self._n_bytes = 0

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the lines that are whole now; raises Garbage at one that is too long."""
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            self._add(end)
            line, self._parts, self._n_bytes = b"".join(self._parts), [], 0
            if line:
                yield line
        self._add(rest)

    def _add(self, part: bytes) -> None:
        self._n_bytes += len(part)
        if self._n_bytes > self._max_bytes:
            raise Garbage(f"line: got more than {self._max_bytes} bytes")
        if part:
            self._parts.append(part)


def read_message(line: bytes) -> Message:
    """Read one line of the stream; raises Garbage that names the field."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Garbage(f"line: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise Garbage(f"line: got {type(value).__name__}, expected an object")
    kind = value.get("kind")
    try:
        if kind == "snapshot":
            place = Place(_epoch(value), _version(value))
            return Snapshot(place, _table(value))
        if kind == "change":
            return Change(_version(value), dict(_moves(value)))
    except TableError as error:
        raise Garbage(str(error)) from error
    if not isinstance(kind, str):
        raise Garbage(f"kind: got {kind!r}, expected a string")
    return Ping()


def _epoch(value: Mapping[str, Any]) -> str | int:
    epoch = value.get("epoch")
    if not isinstance(epoch, str | int) or isinstance(epoch, bool) or epoch == "":
        raise Garbage(f"epoch: got {epoch!r}, expected a name or a number")
    return epoch


def _version(value: Mapping[str, Any]) -> int:
    version = value.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 0:
        raise Garbage(f"version: got {version!r}, expected a number of 0 or more")
    return version


def _table(value: Mapping[str, Any]) -> FunctionTable:
    table = value.get("table")
    if not isinstance(table, dict):
        raise Garbage(f"table: got {type(table).__name__}, expected an object")
    return FunctionTable.from_json(table)


def _moves(value: Mapping[str, Any]) -> Iterator[tuple[str, tuple[str, ...]]]:
    functions = value.get("functions")
    if not isinstance(functions, list):
        raise Garbage(f"functions: got {type(functions).__name__}, expected a list")
    for function in functions:
        if not isinstance(function, dict):
            raise Garbage(f"functions: got {type(function).__name__}, expected objects")
        # A change leaves the experts out: they stay. Id and addresses are checked as in a table.
        entry = FunctionEntry.from_json({**function, "layers": [0], "experts": [0]})
        yield entry.spec.id, entry.addresses
