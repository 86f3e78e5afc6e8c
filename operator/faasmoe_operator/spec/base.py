"""What all parts of a MoEModel share: camelCase names, no unknown keys, no silent conversions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError


class Part(BaseModel):
    """A part of a MoEModel; immutable once read."""

    model_config = ConfigDict(
        alias_generator=to_camel, extra="forbid", frozen=True, strict=True, allow_inf_nan=False
    )

    def to_object(self) -> dict[str, Any]:
        """Return the part as Kubernetes and YAML write it, without what is not given."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


def rule_broken(field: str, *, got: Any, expected: str) -> PydanticCustomError:
    """Return the error of a rule over several fields, so that one of them is named.

    Args:
        field: camelCase path of the field to name, relative to the part that checks the rule.
        got: the field's value.
        expected: what would be right, in words.
    """
    context = {"field": field, "got": got, "expected": expected}
    return PydanticCustomError("rule_broken", "{field}: expected {expected}", context)


def check_unique(field: str, values: Sequence[str], *, key: str = "") -> None:
    """Raise the error of the first value that is that of another before it.

    Args:
        field: camelCase path of the list.
        values: what tells its entries apart.
        key: field of an entry that holds its value, if the entries are no plain texts.
    """
    for index, value in enumerate(values):
        if value in values[:index]:
            place = f"{field}.{index}.{key}" if key else f"{field}.{index}"
            raise rule_broken(place, got=value, expected=f"each {key or 'name'} once")
