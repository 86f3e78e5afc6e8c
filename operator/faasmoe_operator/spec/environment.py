"""Variables in the environment of a process or a container."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator

from faasmoe_operator.spec import patterns
from faasmoe_operator.spec.base import Part, check_unique, rule_broken
from faasmoe_operator.spec.extensions import cel, checked, map_list, rules
from faasmoe_operator.spec.references import KeyReference

RESERVED_PREFIX = "FAASMOE_"
MAX_VARIABLES = 64

VariableName = Annotated[
    str,
    Field(
        pattern=patterns.VARIABLE,
        max_length=128,
        json_schema_extra=checked(
            cel(
                f"!self.startsWith('{RESERVED_PREFIX}')",
                f"expected a name without the prefix {RESERVED_PREFIX}, whose variables are fields "
                "of the spec",
                reason="FieldValueForbidden",
            )
        ),
    ),
]
VariableValue = Annotated[str, Field(max_length=32_768)]
VARIABLES = map_list("name")


class EnvironmentVariable(Part):
    """A variable in the environment of a process."""

    name: VariableName
    value: VariableValue = ""


class ValueSource(Part):
    """Where the value of a variable comes from."""

    model_config = rules(
        cel(
            "has(self.secretKeyRef) != has(self.configMapKeyRef)",
            "expected exactly one of secretKeyRef and configMapKeyRef",
        )
    )

    secret_key_ref: KeyReference | None = None
    config_map_key_ref: KeyReference | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.secret_key_ref is None) == (self.config_map_key_ref is None):
            got = "both" if self.secret_key_ref else None
            expected = "exactly one of secretKeyRef and configMapKeyRef"
            raise rule_broken("secretKeyRef", got=got, expected=expected)
        return self


class ContainerVariable(Part):
    """A variable in the environment of a container."""

    model_config = rules(
        cel("!(has(self.value) && has(self.valueFrom))", "expected value or valueFrom, not both")
    )

    name: VariableName
    value: VariableValue | None = None
    value_from: ValueSource | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.value is not None and self.value_from is not None:
            raise rule_broken("value", got=self.value, expected="none beside valueFrom")
        return self


def check_variables(names: Sequence[str]) -> None:
    """Raise the error of a name that is ours, or of one that is given twice."""
    for index, name in enumerate(names):
        if name.startswith(RESERVED_PREFIX):
            expected = f"a name without the prefix {RESERVED_PREFIX}"
            raise rule_broken(f"env.{index}.name", got=name, expected=expected)
    check_unique("env", names, key="name")
