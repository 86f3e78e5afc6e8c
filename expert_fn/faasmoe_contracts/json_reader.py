"""Strict reading of JSON messages: checks types and bounds, rejects unknown fields.

Errors name the invalid field. The dataclasses of `usage` and `control_messages` use it in
`from_json`, so that both ends of a connection enforce the same contract. It knows no message.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Collection

from faasmoe_contracts.text import short_repr

MAX_COUNT = 1 << 53
"""Largest count in a message: beyond it a JSON number is not exact in every implementation."""
MAX_SHOWN_NAME = 64  # characters of an unknown field's name in an error


class ContractError(ValueError):
    """A message that violates its contract.

    Attributes:
        field: dotted path of the invalid field, such as `tenants.acme.failed`.
        received: description of the value received.
        expected: description of a valid value.
    """

    def __init__(self, field: str, received: str, expected: str) -> None:
        super().__init__(f"{field}: got {received}, expected {expected}")
        self.field = field
        self.received = received
        self.expected = expected


def parse_json(content: bytes, *, field: str) -> object:
    """Return the value of a JSON text.

    Args:
        content: the text, UTF-8.
        field: name of the text in error messages.

    Raises:
        ContractError: the content is not JSON.
    """
    try:
        return json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ContractError(field, f"no JSON ({error})", "JSON") from error


class ObjectReader:
    """Reads the fields of one JSON object; every method raises ContractError on an invalid field.

    Args:
        value: a parsed JSON value, which must be an object.
        field: name of the object in error messages.
        path: prefix of its fields' paths; empty for the message itself.
        known: names of all fields that the object may have; None allows any.
    """

    def __init__(
        self,
        value: object,
        *,
        field: str = "body",
        path: str = "",
        known: Collection[str] | None = None,
    ) -> None:
        if not isinstance(value, dict):
            raise ContractError(field, short_repr(value), "an object")
        self._fields = value
        self._path = path
        unknown = next((name for name in value if known is not None and name not in known), None)
        if unknown is not None:
            field = self.path(unknown[:MAX_SHOWN_NAME])
            raise ContractError(field, short_repr(value[unknown]), "no such field")

    def __contains__(self, name: str) -> bool:
        """Return whether the object has a field."""
        return name in self._fields

    def error(self, name: str, expected: str) -> ContractError:
        """Return the error of a field's value."""
        received = short_repr(self._fields[name]) if name in self._fields else "nothing"
        return ContractError(self.path(name), received, expected)

    def get(self, name: str) -> object:
        """Return a field's value as it is, None if the field is absent."""
        return self._fields.get(name)

    def path(self, name: str) -> str:
        """Return the dotted path of a field."""
        return f"{self._path}.{name}" if self._path else name

    def count(self, name: str, *, maximum: int = MAX_COUNT) -> int:
        """Return an integer from 0 to `maximum`."""
        value = self._fields.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= maximum:
            raise self.error(name, f"an integer from 0 to {maximum}")
        return value

    def number(
        self, name: str, *, minimum: float = 0.0, maximum: float = sys.float_info.max
    ) -> float:
        """Return a finite number from `minimum` to `maximum`."""
        value = self._fields.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and minimum <= value <= maximum:  # type: ignore[operator]  # NaN fails
            return float(value)  # type: ignore[arg-type]
        raise self.error(name, f"a finite number from {minimum:g} to {maximum:g}")

    def flag(self, name: str, *, default: bool) -> bool:
        """Return a boolean, or the default if the field is absent."""
        value = self._fields.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, "true or false")
        return value

    def text(self, name: str, *, pattern: re.Pattern[str], expected: str) -> str:
        """Return a string that matches a pattern as a whole."""
        value = self._fields.get(name)
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise self.error(name, expected)
        return value

    def mapping(self, name: str, *, max_length: int = MAX_COUNT) -> dict[str, object]:
        """Return an object of at most `max_length` fields."""
        value = self._fields.get(name)
        if not isinstance(value, dict) or len(value) > max_length:
            raise self._length_error(name, value, "an object", max_length)
        return value

    def array(self, name: str, *, max_length: int = MAX_COUNT) -> list[object]:
        """Return a list of at most `max_length` items."""
        value = self._fields.get(name)
        if not isinstance(value, list) or len(value) > max_length:
            raise self._length_error(name, value, "a list", max_length)
        return value

    def _length_error(self, name: str, value: object, kind: str, max_length: int) -> ContractError:
        if isinstance(value, dict | list) and len(value) > max_length:
            return ContractError(self.path(name), f"{len(value)} entries", f"at most {max_length}")
        return self.error(name, kind)


def require_finite(value: object, *, field: str) -> float:
    """Return a finite number of 0 or more, an integer as it is; raises ContractError."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ContractError(field, short_repr(value), "a number")
    if not 0 <= value <= sys.float_info.max:  # NaN fails the comparison
        raise ContractError(field, short_repr(value), "a finite number of 0 or more")
    return value
