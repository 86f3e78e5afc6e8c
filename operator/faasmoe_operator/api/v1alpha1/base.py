"""Base class, CRD extensions and validation helpers of all API types.

API types have camelCase names, reject unknown keys and convert no values silently. What a CRD needs
beyond types and bounds (CEL rules, list types, the platform of a field) is declared next to the
pydantic field or validator that it repeats for the Kubernetes API server; `crd.py` copies it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

VALIDATIONS = "x-kubernetes-validations"
PLATFORM_EXTENSION = "x-faasmoe-platform"  # read by validation.py and crd.py, never in the CRD

SchemaExtension = dict[str, Any]
# Not FieldValueDuplicate, for which the API server shows no message.
FieldErrorReason = Literal["FieldValueForbidden", "FieldValueRequired"]

KUBERNETES_ONLY: SchemaExtension = {PLATFORM_EXTENSION: "kubernetes"}
PROCESS_ONLY: SchemaExtension = {PLATFORM_EXTENSION: "process"}
LIST_TYPE_SET: SchemaExtension = {"x-kubernetes-list-type": "set"}


def list_type_map(*keys: str) -> SchemaExtension:
    """Declare a list whose entries are identified by fields, so that appliers can share it."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": list(keys)}


def cel_rule(
    rule: str, message: str, *, field: str | None = None, reason: FieldErrorReason | None = None
) -> SchemaExtension:
    """Return one CEL rule for the API server.

    Args:
        rule: the expression; `self` is the value that the rule is attached to, `oldSelf` its
            previous one.
        message: what was expected, and what to do.
        field: path of the field to report, such as `.minScale`; default: the rule's own place.
        reason: reason of the error; default: FieldValueInvalid.
    """
    optional = {"fieldPath": field, "reason": reason}
    options = {name: value for name, value in optional.items() if value is not None}
    return {"rule": rule, "message": message, **options}


def validations(*cel_rules: SchemaExtension) -> SchemaExtension:
    """Attach CEL rules to a field."""
    return {VALIDATIONS: list(cel_rules)}


def model_validations(*cel_rules: SchemaExtension) -> ConfigDict:
    """Return the configuration of a type with CEL rules over several of its fields."""
    return ConfigDict(json_schema_extra=validations(*cel_rules))


class ApiModel(BaseModel):
    """Base class of all API types; instances are immutable."""

    model_config = ConfigDict(
        alias_generator=to_camel, extra="forbid", frozen=True, strict=True, allow_inf_nan=False
    )

    def to_object(self) -> dict[str, Any]:
        """Return the value as JSON with camelCase names, without fields that are None."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def validation_error(field: str, *, got: Any, expected: str) -> PydanticCustomError:
    """Return the error of a rule over several fields, which names one of them.

    Args:
        field: camelCase path of that field, relative to the type that checks the rule.
        got: the field's value.
        expected: what was expected, for humans.
    """
    context = {"field": field, "got": got, "expected": expected}
    return PydanticCustomError("rule_broken", "{field}: expected {expected}", context)


def validate_unique(field: str, values: Sequence[str], *, key: str = "") -> None:
    """Raise a validation error for the first duplicate value.

    Args:
        field: camelCase path of the list.
        values: the values that must be unique.
        key: the field of an entry that holds the value; empty if the entries are the values.
    """
    for index, value in enumerate(values):
        if value in values[:index]:
            field_path = f"{field}.{index}.{key}" if key else f"{field}.{index}"
            raise validation_error(field_path, got=value, expected=f"each {key or 'name'} once")
