"""Quantities as Kubernetes writes them: `500m`, `4`, `1.5Gi`, `2e9`."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from math import ceil
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from faasmoe_operator.spec.extensions import Extension, cel, checked
from faasmoe_operator.spec.patterns import QUANTITY, WORDS

MAX_CHARS = 32
_BINARY = {f"{letter}i": Fraction(1 << 10 * (n + 1)) for n, letter in enumerate("KMGTPE")}
_DECIMAL = {letter: Fraction(10) ** (3 * (n - 3)) for n, letter in enumerate("num_kMGTPE")}
_FACTORS = _BINARY | _DECIMAL | {"": Fraction(1)}


def parse_quantity(text: str) -> Fraction:
    """Return the exact value of a quantity; raises ValueError with what was expected."""
    found = re.fullmatch(QUANTITY, text)
    if found is None or len(text) > MAX_CHARS:
        raise ValueError(WORDS[QUANTITY])
    number, suffix = Fraction(found[1]), found[3] or ""
    if suffix[:1] in ("e", "E") and suffix[1:] not in ("", "i"):
        return number * Fraction(10) ** int(suffix[1:])
    return number * _FACTORS[suffix]


def to_bytes(quantity: str) -> int:
    """Return the bytes of a quantity of memory, parts of one rounded up as Kubernetes does."""
    return ceil(parse_quantity(quantity))


def _read(value: Any) -> str:
    """Take a text, or a whole number as YAML reads it; to the API server 0.5 is no quantity."""
    try:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            raise ValueError(f"{WORDS[QUANTITY]}, in quotes if it has a point")
        parse_quantity(value)
    except ValueError as error:
        raise PydanticCustomError("quantity", "{expected}", {"expected": str(error)}) from error
    return value


def _between(least: str, most: str) -> Callable[[str], str]:
    bounds = parse_quantity(least), parse_quantity(most)

    def check(value: str) -> str:
        if not bounds[0] <= parse_quantity(value) <= bounds[1]:
            expected = {"expected": f"a quantity from {least} to {most}"}
            raise PydanticCustomError("quantity", "{expected}", expected)
        return value

    return check


def _schema(*rules: Extension) -> dict[str, Any]:
    text = {"type": "string", "pattern": QUANTITY, "maxLength": MAX_CHARS, "minimum": 0}
    return text | {"x-kubernetes-int-or-string": True} | (checked(*rules) if rules else {})


def _cel_between(least: str, most: str) -> Extension:
    value = "quantity(string(self))"
    lower = f"{value}.compareTo(quantity('{least}')) >= 0"
    upper = f"{value}.compareTo(quantity('{most}')) <= 0"
    return cel(f"{lower} && {upper}", f"expected a quantity from {least} to {most}")


Quantity = Annotated[str, BeforeValidator(_read), WithJsonSchema(_schema())]
"""An amount of a resource, kept as it was written."""

LEAST_BYTES, MOST_BYTES = "1Mi", "1Pi"
ByteQuantity = Annotated[
    Quantity,
    AfterValidator(_between(LEAST_BYTES, MOST_BYTES)),
    WithJsonSchema(_schema(_cel_between(LEAST_BYTES, MOST_BYTES))),
]
"""An amount of memory or disk, kept as it was written."""
