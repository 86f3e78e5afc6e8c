"""Strict reading of JSON objects: each field is there, has its type, and no other field is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from faasmoe_expert.errors import shown
from faasmoe_expert.store.errors import StoreError


class Fields:
    """The fields of one JSON object, read by name; `finish` refuses what was not asked for."""

    __slots__ = ("_left", "_where")

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, Mapping):
            raise StoreError(f"{where}: got {shown(value)}, expected a JSON object")
        self._left = dict(value)
        self._where = where

    def take(self, name: str) -> Any:
        """Return any JSON value of the field `name`."""
        if name not in self._left:
            raise StoreError(f"{self._where}.{name}: got nothing, expected the field")
        return self._left.pop(name)

    def text(self, name: str) -> str:
        """Return a string that is not empty."""
        value = self.take(name)
        if not isinstance(value, str) or not value:
            raise self.wrong(name, value, "a string that is not empty")
        return value

    def integer(self, name: str, *, least: int = 0) -> int:
        """Return an integer of at least `least`."""
        value = self.take(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.wrong(name, value, f"an integer of {least} or more")
        return value

    def items(self, name: str) -> list[Any]:
        """Return a JSON array."""
        value = self.take(name)
        if not isinstance(value, list):
            raise self.wrong(name, value, "an array")
        return value

    def mapping(self, name: str) -> dict[str, Any]:
        """Return a JSON object."""
        value = self.take(name)
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return value

    def wrong(self, name: str, got: object, expected: str) -> StoreError:
        """Return the error for the field `name`."""
        return StoreError(f"{self._where}.{name}: got {shown(got)}, expected {expected}")

    def finish(self) -> None:
        """Refuse fields that nobody took."""
        if self._left:
            names = ", ".join(sorted(map(str, self._left)))
            raise StoreError(f"{self._where}: got unknown fields {names}, expected none")
