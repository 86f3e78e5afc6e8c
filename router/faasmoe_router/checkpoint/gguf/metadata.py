"""The values of a GGUF file's keys, each with a type and a range.

Errors name the file and the key, what was got and what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from faasmoe_contracts.text import short_repr
from faasmoe_router.checkpoint.gguf.header import Value
from faasmoe_router.errors import SourceDamaged

MAX_INTEGER = (1 << 31) - 1
_T = TypeVar("_T")


class Metadata:
    """The metadata of a file.

    Args:
        values: the values by key.
        name: the file's name, for messages.
    """

    def __init__(self, values: Mapping[str, Value], name: str) -> None:
        self._values = values
        self._name = name

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def error(self, key: str, got: object, expected: str) -> SourceDamaged:
        """Return an error that names the file and the key."""
        shown = "nothing" if got is None else short_repr(got)
        return SourceDamaged(f"{self._name}: {key}: got {shown}, expected {expected}")

    def integer(self, key: str, *, minimum: int = 1, maximum: int = MAX_INTEGER) -> int:
        """Return an integer; raises SourceDamaged if it is missing or out of range."""
        value = self._values.get(key)
        if type(value) is not int or not minimum <= value <= maximum:
            raise self.error(key, value, f"an integer from {minimum} to {maximum}")
        return value

    def optional_integer(
        self, key: str, *, minimum: int = 1, maximum: int = MAX_INTEGER
    ) -> int | None:
        """Return an integer, or None if there is no such key."""
        return self.integer(key, minimum=minimum, maximum=maximum) if key in self else None

    def number(self, key: str, *, maximum: float = 1e12) -> float:
        """Return a positive number: the shortest that is the same in float32."""
        value = self._values.get(key)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not isinstance(value, int | float) or not 0 < value <= maximum:
            raise self.error(key, value, f"a positive number up to {maximum:g}")
        shortest = float(str(np.float32(value)))
        return shortest if math.isfinite(shortest) and shortest > 0 else float(value)

    def optional_number(self, key: str, *, maximum: float = 1e12) -> float | None:
        """Return a positive number, or None if there is no such key."""
        return self.number(key, maximum=maximum) if key in self else None

    def boolean(self, key: str, default: bool) -> bool:
        """Return a boolean; the default if there is no such key."""
        return self._typed(key, default, bool, "a boolean")

    def string(self, key: str, default: str | None = None) -> str:
        """Return a string; raises SourceDamaged if it is missing and there is no default."""
        return self._typed(key, default, str, "a string")

    def optional_string(self, key: str) -> str | None:
        """Return a string, or None if there is no such key."""
        return self.string(key) if key in self else None

    def strings(self, key: str) -> list[str] | None:
        """Return an array of strings, or None if there is no such key."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.error(key, value, "an array of strings")
        return value

    def numbers(self, key: str, *, length: int) -> list[Any] | None:
        """Return an array of `length` numbers, or None if there is no such key."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or len(value) != length:
            got = f"{len(value)} items" if isinstance(value, np.ndarray | list) else value
            raise self.error(key, got, f"an array of {length} numbers")
        return list(value.tolist())

    def choice(self, key: str, choices: Sequence[_T], default: _T) -> _T:
        """Return a value that is one of `choices`; the default if there is no such key."""
        value: Any = self._values.get(key, default)
        for choice in choices:
            if type(value) is type(choice) and value == choice:
                return choice
        raise self.error(key, value, "one of " + ", ".join(map(str, choices)))

    def _typed(self, key: str, default: _T | None, kind: type[_T], expected: str) -> _T:
        value: Any = self._values.get(key, default)
        if not isinstance(value, kind):
            raise self.error(key, value, expected)
        return value
