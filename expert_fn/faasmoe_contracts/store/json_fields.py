"""Strict reading of a store's JSON objects, and the error of an unusable store."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from faasmoe_contracts.text import short_repr


class StoreError(Exception):
    """Raised for an unusable store; the message names the file and field, got and expected."""


class JsonFields:
    """Strict reader of one JSON object.

    Every `pop_*` method consumes one field and raises StoreError if it is missing or has another
    type. Call `reject_unknown` last.
    """

    __slots__ = ("_path", "_remaining")

    def __init__(self, value: object, path: str) -> None:
        if not isinstance(value, Mapping):
            raise StoreError(f"{path}: got {short_repr(value)}, expected a JSON object")
        self._remaining = dict(value)
        self._path = path

    def has(self, name: str) -> bool:
        """Return whether the field `name` is there."""
        return name in self._remaining

    def pop(self, name: str) -> Any:
        """Return the field `name`, any JSON value."""
        if name not in self._remaining:
            raise StoreError(f"{self._path}.{name}: got nothing, expected the field")
        return self._remaining.pop(name)

    def pop_string(self, name: str) -> str:
        """Return a non-empty string field."""
        value = self.pop(name)
        if not isinstance(value, str) or not value:
            raise self.error(name, value, "a non-empty string")
        return value

    def pop_integer(self, name: str, *, minimum: int = 0) -> int:
        """Return an integer field of at least `minimum`."""
        value = self.pop(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.error(name, value, f"an integer of {minimum} or more")
        return value

    def pop_array(self, name: str) -> list[Any]:
        """Return an array field."""
        value = self.pop(name)
        if not isinstance(value, list):
            raise self.error(name, value, "an array")
        return value

    def pop_object(self, name: str) -> dict[str, Any]:
        """Return an object field."""
        value = self.pop(name)
        if not isinstance(value, dict):
            raise self.error(name, value, "an object")
        return value

    def pop_optional_object(self, name: str) -> dict[str, Any]:
        """Return an object field that may be absent, which stands for an empty object."""
        return self.pop_object(name) if name in self._remaining else {}

    def pop_boolean(self, name: str) -> bool:
        """Return a boolean field."""
        value = self.pop(name)
        if not isinstance(value, bool):
            raise self.error(name, value, "true or false")
        return value

    def pop_number(self, name: str) -> float:
        """Return a field that is a finite number of 0 or more."""
        value = self.pop(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value < math.inf:
            raise self.error(name, value, "a number of 0 or more")
        return float(value)

    def pop_choice(self, name: str, choices: Iterable[str]) -> str:
        """Return a string field that is one of `choices`."""
        value, allowed = self.pop(name), tuple(choices)
        if not isinstance(value, str) or value not in allowed:
            raise self.error(name, value, f"one of {', '.join(allowed)}")
        return value

    def all(self) -> dict[str, Any]:
        """Return the fields that remain."""
        return dict(self._remaining)

    def error(self, name: str, got: object, expected: str) -> StoreError:
        """Return the error for the field `name`."""
        return StoreError(f"{self._path}.{name}: got {short_repr(got)}, expected {expected}")

    def reject_unknown(self) -> None:
        """Raise StoreError if fields remain that no `pop_*` call consumed."""
        if self._remaining:
            names = ", ".join(sorted(map(str, self._remaining)))
            raise StoreError(f"{self._path}: got unknown fields {names}, expected none")
