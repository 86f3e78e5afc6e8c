"""Settings in environment variables: strict parsers, and error messages that name the variable.

Router and operator validate their settings with pydantic-settings and use these parsers as
validators, so that every message reads `VARIABLE: got VALUE, expected WHAT`. Imports no pydantic.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

MAX_DIGITS = 20


class SettingField(Protocol):
    """Definition of a setting, such as pydantic's FieldInfo.

    Attributes:
        description: description of a valid value, for a variable that is not set.
        repr: whether the value may be shown; False for a secret.
    """

    description: str | None
    repr: bool


def variable_name(field: str, *, prefix: str) -> str:
    """Return the variable of a field: upper case, without the unit of seconds."""
    return prefix + field.removesuffix("_s").upper()


def read_variables(fields: Iterable[str], env: Mapping[str, str], *, prefix: str) -> dict[str, Any]:
    """Return the texts of the fields' variables; an empty variable counts as not set.

    Args:
        fields: names of the fields.
        env: the environment.
        prefix: prefix of the variables.
    """
    texts = {field: env.get(variable_name(field, prefix=prefix), "") for field in fields}
    return {field: text for field, text in texts.items() if text}


def integer_between(low: int, high: int) -> Callable[[Any], Any]:
    """Return a parser of decimal integers from `low` to `high`.

    It returns a value that is no string as it is, and raises ValueError with the expected range.
    """

    def parse(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        is_integer = value.isascii() and value.isdecimal() and len(value) <= MAX_DIGITS
        if not is_integer or not low <= int(value) <= high:
            raise ValueError(f"an integer from {low} to {high}")
        return int(value)

    return parse


def seconds_between(low: float, high: float) -> Callable[[Any], Any]:
    """Return a parser of seconds from `low` to `high`; see `integer_between`."""

    def parse(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        error = ValueError(f"seconds, a number from {low:g} to {high:g}")
        try:
            seconds = float(value)
        except ValueError:
            raise error from None
        if not low <= seconds <= high:  # NaN fails the comparison
            raise error
        return seconds

    return parse


def true_or_false(value: Any) -> Any:
    """Parse `true` or `false`; raises ValueError with the valid values."""
    if not isinstance(value, str):
        return value
    if value not in ("true", "false"):
        raise ValueError("one of false, true")
    return value == "true"


def split_at_commas(value: Any) -> Any:
    """Return the parts of a string between commas, without blanks and empty parts."""
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


def describe_setting_error(
    error: Mapping[str, Any], fields: Mapping[str, SettingField], *, prefix: str
) -> str:
    """Return the message for an invalid setting.

    Args:
        error: one of pydantic's error details: `type`, `loc`, `input`, `msg` and `ctx`.
        fields: definitions of the settings, by field.
        prefix: prefix of the variables.
    """
    if not error["loc"]:  # a validator of several settings, which names them itself
        return str(error["ctx"]["error"])
    field = fields[error["loc"][0]]
    variable = variable_name(error["loc"][0], prefix=prefix)
    if error["type"] == "missing":
        return f"{variable}: not set, expected {field.description}"
    received = f"got {error['input']!r}, " if field.repr else ""
    return f"{variable}: {received}expected {_expected(error)}"


def _expected(error: Mapping[str, Any]) -> str:
    if error["type"] == "literal_error":
        return "one of " + ", ".join(re.findall("'([^']*)'", error["ctx"]["expected"]))
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    return str(error["msg"])
