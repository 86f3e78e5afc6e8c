"""What a user may say of pods: where they run, with what, as what; all else is the operator's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from faasmoe_operator.spec import patterns
from faasmoe_operator.spec.base import Part, check_unique, rule_broken
from faasmoe_operator.spec.environment import (
    MAX_VARIABLES,
    VARIABLES,
    ContainerVariable,
    check_variables,
)
from faasmoe_operator.spec.extensions import Extension, cel, checked, map_list, rules
from faasmoe_operator.spec.quantity import Quantity, parse_quantity
from faasmoe_operator.spec.references import (
    Annotations,
    LabelKey,
    Labels,
    LabelValue,
    ObjectName,
    ObjectReference,
)

OWN_PREFIXES = ("faasmoe.dev/", "app.kubernetes.io/")
_OWN = " and ".join(OWN_PREFIXES)

Amounts = Annotated[dict[LabelKey, Quantity], Field(max_length=16)]
FreeForm = Annotated[
    dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})
]


def _own_keys_refused() -> Extension:
    free = " && ".join(f"!key.startsWith('{prefix}')" for prefix in OWN_PREFIXES)
    message = f"expected keys without the prefixes {_OWN}, which are the operator's"
    return checked(cel(f"self.all(key, {free})", message, reason="FieldValueForbidden"))


class Resources(Part):
    """What a container asks for and may use at most."""

    model_config = rules(
        cel(
            "!has(self.requests) || !has(self.limits) || self.requests.all(name, "
            "!(name in self.limits) || quantity(string(self.requests[name]))"
            ".compareTo(quantity(string(self.limits[name]))) <= 0)",
            "expected no request above the limit of the same resource",
            field=".requests",
        )
    )

    requests: Amounts | None = Field(None, description="Amounts that are kept free for it.")
    limits: Amounts | None = Field(None, description="Amounts that it may use at most.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        limits = self.limits or {}
        for name, request in (self.requests or {}).items():
            limit = limits.get(name, request)
            if parse_quantity(request) > parse_quantity(limit):
                expected = f"at most the limit ({limit})"
                raise rule_broken(f"requests.{name}", got=request, expected=expected)
        return self


class Toleration(Part):
    """A taint of nodes that keeps the pods not away."""

    model_config = rules(
        cel(
            "self.operator != 'Exists' || !has(self.value)",
            "expected no value with the operator Exists, which takes every value",
        ),
        cel(
            "has(self.key) || self.operator == 'Exists'",
            "expected a key, or the operator Exists for every taint",
        ),
    )

    key: LabelKey | None = Field(None, description="Every taint if left out.")
    operator: Literal["Exists", "Equal"] = "Equal"
    value: LabelValue | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    toleration_seconds: Annotated[int, Field(ge=0, le=1_000_000_000)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.operator == "Exists" and self.value is not None:
            raise rule_broken("value", got=self.value, expected="none with the operator Exists")
        if self.operator != "Exists" and self.key is None:
            raise rule_broken("key", got=None, expected="a key, or the operator Exists")
        return self


class Affinity(Part):
    """Kubernetes' affinity, handed to the pods as it is."""

    node_affinity: FreeForm | None = None
    pod_affinity: FreeForm | None = None
    pod_anti_affinity: FreeForm | None = None


class TopologySpread(Part):
    """How evenly the pods of a model spread over nodes or zones."""

    topology_key: LabelKey
    max_skew: int = Field(1, ge=1, le=1000)
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"] = "ScheduleAnyway"


class PodTemplate(Part):
    """What the pods are like beyond what the operator decides. Kubernetes only."""

    labels: Labels | None = Field(None, json_schema_extra=_own_keys_refused())
    annotations: Annotations | None = Field(None, json_schema_extra=_own_keys_refused())
    resources: Resources | None = Field(None, description="The operator's defaults if left out.")
    node_selector: Labels | None = None
    tolerations: tuple[Toleration, ...] = Field((), strict=False, max_length=32)
    affinity: Affinity | None = None
    topology_spread_constraints: tuple[TopologySpread, ...] = Field(
        (), strict=False, max_length=8, json_schema_extra=map_list("topologyKey")
    )
    priority_class_name: ObjectName | None = None
    runtime_class_name: ObjectName | None = None
    image: Annotated[str, Field(pattern=patterns.IMAGE, max_length=512)] | None = Field(
        None, description="The operator's image for these pods if left out."
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    image_pull_secrets: tuple[ObjectReference, ...] = Field(
        (), strict=False, max_length=8, json_schema_extra=map_list("name")
    )
    env: tuple[ContainerVariable, ...] = Field(
        (), strict=False, max_length=MAX_VARIABLES, json_schema_extra=VARIABLES
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_keys("labels", self.labels)
        _check_keys("annotations", self.annotations)
        check_variables([variable.name for variable in self.env])
        secrets = [secret.name for secret in self.image_pull_secrets]
        check_unique("imagePullSecrets", secrets, key="name")
        keys = [spread.topology_key for spread in self.topology_spread_constraints]
        check_unique("topologySpreadConstraints", keys, key="topologyKey")
        return self


def _check_keys(field: str, entries: Mapping[str, str] | None) -> None:
    for key in entries or ():
        if key.startswith(OWN_PREFIXES):
            expected = f"a key without the prefixes {_OWN}, which are the operator's"
            raise rule_broken(f"{field}.{key}", got=key, expected=expected)
