"""What the CRD says beyond types and bounds: CEL rules, merging of lists, where a field holds.

Each stands beside the pydantic field or rule that it repeats for the Kubernetes API server;
`crd.py` carries them over.

What all parts of a MoEModel share: camelCase names, no unknown keys, no silent conversions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

VALIDATIONS = "x-kubernetes-validations"
PLATFORM_EXTENSION = "x-faasmoe-platform"  # ours: read by platform.py and crd.py, never in the CRD

SchemaExtension = dict[str, Any]
FieldErrorReason = Literal[
    "FieldValueForbidden", "FieldValueRequired"
]  # of Duplicate no message is shown

KUBERNETES_ONLY: SchemaExtension = {PLATFORM_EXTENSION: "kubernetes"}
PROCESS_ONLY: SchemaExtension = {PLATFORM_EXTENSION: "process"}
LIST_TYPE_SET: SchemaExtension = {"x-kubernetes-list-type": "set"}


def list_type_map(key: str) -> SchemaExtension:
    """Mark a list whose entries are told apart by a field, so that appliers may share it."""
    return {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}


def cel_rule(
    rule: str, message: str, *, field: str | None = None, reason: FieldErrorReason | None = None
) -> SchemaExtension:
    """Return one rule for the API server.

    Args:
        rule: the expression; `self` is what it stands at, `oldSelf` what it was before.
        message: what was expected, and what to do.
        field: path of the field to name, such as `.minScale`; the place of the rule if left out.
        reason: what kind of fault it is; an invalid value if left out.
    """
    optional = {"fieldPath": field, "reason": reason}
    given = {name: value for name, value in optional.items() if value is not None}
    return {"rule": rule, "message": message, **given}


def validations(*cel_rules: SchemaExtension) -> SchemaExtension:
    """Mark a field with the rules that the API server checks at it."""
    return {VALIDATIONS: list(cel_rules)}


def model_validations(*cel_rules: SchemaExtension) -> ConfigDict:
    """Return the configuration of a part with rules over several of its fields."""
    return ConfigDict(json_schema_extra=validations(*cel_rules))


class ApiModel(BaseModel):
    """A part of a MoEModel; immutable once read."""

    model_config = ConfigDict(
        alias_generator=to_camel, extra="forbid", frozen=True, strict=True, allow_inf_nan=False
    )

    def to_object(self) -> dict[str, Any]:
        """Return the part as Kubernetes and YAML write it, without what is not given."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def validation_error(field: str, *, got: Any, expected: str) -> PydanticCustomError:
    """Return the error of a rule over several fields, so that one of them is named.

    Args:
        field: camelCase path of the field to name, relative to the part that checks the rule.
        got: the field's value.
        expected: what would be right, in words.
    """
    context = {"field": field, "got": got, "expected": expected}
    return PydanticCustomError("rule_broken", "{field}: expected {expected}", context)


def validate_unique(field: str, values: Sequence[str], *, key: str = "") -> None:
    """Raise the error of the first value that is that of another before it.

    Args:
        field: camelCase path of the list.
        values: what tells its entries apart.
        key: field of an entry that holds its value, if the entries are no plain texts.
    """
    for index, value in enumerate(values):
        if value in values[:index]:
            field_path = f"{field}.{index}.{key}" if key else f"{field}.{index}"
            raise validation_error(field_path, got=value, expected=f"each {key or 'name'} once")
