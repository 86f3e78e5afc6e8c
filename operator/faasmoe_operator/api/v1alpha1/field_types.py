"""Field types of the API: index ranges, resource quantities, names, labels and references.

Index ranges are texts such as "0-3,7". Quantities are Kubernetes' own, such as `500m`, `4`, `1.5Gi`
or `2e9`, and are kept as they were written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fractions import Fraction
from math import ceil
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from faasmoe_operator.api.v1alpha1 import patterns
from faasmoe_operator.api.v1alpha1.base import ApiModel, SchemaExtension, cel_rule, validations
from faasmoe_operator.api.v1alpha1.patterns import DESCRIPTIONS, INDEX_RANGES, QUANTITY

MAX_QUANTITY_CHARS = 32
MIN_BYTES, MAX_BYTES = "1Mi", "1Pi"


def parse_index_ranges(text: str) -> frozenset[int]:
    """Return the indices of a text such as "0-3,7".

    Raises:
        ValueError: the text is invalid; the message says what was expected.
    """
    if not re.fullmatch(INDEX_RANGES, text):
        raise ValueError(DESCRIPTIONS[INDEX_RANGES])
    indices: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            raise ValueError(f"the range {part} to be ascending")
        indices.update(range(int(first), int(last or first) + 1))
    return frozenset(indices)


def format_index_ranges(indices: Iterable[int]) -> str:
    """Return indices as a text such as "0-3,7"."""
    runs: list[tuple[int, int]] = []
    for index in sorted(set(indices)):
        if runs and index == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)


_BINARY = {f"{letter}i": Fraction(1 << 10 * (n + 1)) for n, letter in enumerate("KMGTPE")}
_DECIMAL = {letter: Fraction(10) ** (3 * (n - 3)) for n, letter in enumerate("num_kMGTPE")}
_SUFFIX_FACTORS = _BINARY | _DECIMAL | {"": Fraction(1)}


def parse_quantity(text: str) -> Fraction:
    """Return the exact value of a quantity.

    Raises:
        ValueError: the text is invalid; the message says what was expected.
    """
    match = re.fullmatch(QUANTITY, text)
    if match is None or len(text) > MAX_QUANTITY_CHARS:
        raise ValueError(DESCRIPTIONS[QUANTITY])
    number, suffix = Fraction(match[1]), match[3] or ""
    if suffix[:1] in ("e", "E") and suffix[1:] not in ("", "i"):
        return number * Fraction(10) ** int(suffix[1:])
    return number * _SUFFIX_FACTORS[suffix]


def quantity_to_bytes(quantity: str) -> int:
    """Return a memory quantity in bytes, rounded up as Kubernetes does."""
    return ceil(parse_quantity(quantity))


def _validate_quantity(value: Any) -> str:
    """Accept a text or an integer, but no float, as the API server does."""
    try:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str):
            raise ValueError(f"{DESCRIPTIONS[QUANTITY]}, in quotes if it has a point")
        parse_quantity(value)
    except ValueError as error:
        raise PydanticCustomError("quantity", "{expected}", {"expected": str(error)}) from error
    return value


def _bounds_validator(minimum: str, maximum: str) -> Callable[[str], str]:
    bounds = parse_quantity(minimum), parse_quantity(maximum)

    def check(value: str) -> str:
        if not bounds[0] <= parse_quantity(value) <= bounds[1]:
            expected = {"expected": f"a quantity from {minimum} to {maximum}"}
            raise PydanticCustomError("quantity", "{expected}", expected)
        return value

    return check


def _quantity_schema(*cel_rules: SchemaExtension) -> dict[str, Any]:
    text = {"type": "string", "pattern": QUANTITY, "maxLength": MAX_QUANTITY_CHARS, "minimum": 0}
    return (
        text | {"x-kubernetes-int-or-string": True} | (validations(*cel_rules) if cel_rules else {})
    )


def _cel_bounds(minimum: str, maximum: str) -> SchemaExtension:
    value = "quantity(string(self))"
    lower = f"{value}.compareTo(quantity('{minimum}')) >= 0"
    upper = f"{value}.compareTo(quantity('{maximum}')) <= 0"
    return cel_rule(f"{lower} && {upper}", f"expected a quantity from {minimum} to {maximum}")


Quantity = Annotated[str, BeforeValidator(_validate_quantity), WithJsonSchema(_quantity_schema())]
"""An amount of a resource, kept as it was written."""

ByteQuantity = Annotated[
    Quantity,
    AfterValidator(_bounds_validator(MIN_BYTES, MAX_BYTES)),
    WithJsonSchema(_quantity_schema(_cel_bounds(MIN_BYTES, MAX_BYTES))),
]
"""An amount of memory or disk, kept as it was written."""


DNSLabel = Annotated[str, Field(pattern=patterns.DNS_LABEL, max_length=63)]
ObjectName = Annotated[str, Field(pattern=patterns.DNS_SUBDOMAIN, max_length=253)]
SecretKey = Annotated[str, Field(pattern=patterns.SECRET_KEY, max_length=253)]
LabelKey = Annotated[str, Field(pattern=patterns.QUALIFIED_NAME, max_length=317)]
LabelValue = Annotated[str, Field(pattern=patterns.LABEL_VALUE, max_length=63)]
Labels = Annotated[dict[LabelKey, LabelValue], Field(max_length=32)]
AnnotationValue = Annotated[str, Field(max_length=32_768)]
Annotations = Annotated[dict[LabelKey, AnnotationValue], Field(max_length=32)]


class LocalObjectReference(ApiModel):
    """An object in the model's namespace."""

    name: ObjectName = Field(description="Name of the object.")


class KeySelector(ApiModel):
    """One key of a Secret or ConfigMap in the model's namespace."""

    name: ObjectName = Field(description="Name of the object.")
    key: SecretKey = Field(description="Key in its data.")
