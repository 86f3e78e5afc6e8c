"""Environment variables, and the pod settings that a user may change.

The operator controls everything else of its pods.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from faasmoe_operator.api.v1alpha1 import patterns
from faasmoe_operator.api.v1alpha1.base import (
    ApiModel,
    SchemaExtension,
    cel_rule,
    list_type_map,
    model_validations,
    validate_unique,
    validation_error,
    validations,
)
from faasmoe_operator.api.v1alpha1.field_types import (
    Annotations,
    KeySelector,
    LabelKey,
    Labels,
    LabelValue,
    LocalObjectReference,
    ObjectName,
    Quantity,
    parse_quantity,
)
from faasmoe_operator.api.v1alpha1.volumes import Volume, VolumeMount

RESERVED_PREFIX = "FAASMOE_"
MAX_ENV_VARS = 64

EnvVarName = Annotated[
    str,
    Field(
        pattern=patterns.ENV_VAR_NAME,
        max_length=128,
        json_schema_extra=validations(
            cel_rule(
                f"!self.startsWith('{RESERVED_PREFIX}')",
                f"expected a name without the prefix {RESERVED_PREFIX}, whose variables are fields "
                "of the spec",
                reason="FieldValueForbidden",
            )
        ),
    ),
]
EnvVarValue = Annotated[str, Field(max_length=32_768)]
ENV_LIST_TYPE = list_type_map("name")


class LiteralEnvVar(ApiModel):
    """An environment variable of a process."""

    name: EnvVarName = Field(description="Name of the variable.")
    value: EnvVarValue = Field("", description="Value of the variable.")


class EnvVarSource(ApiModel):
    """The source of an environment variable's value."""

    model_config = model_validations(
        cel_rule(
            "has(self.secretKeyRef) != has(self.configMapKeyRef)",
            "expected exactly one of secretKeyRef and configMapKeyRef",
        )
    )

    secret_key_ref: KeySelector | None = Field(
        None, description="A key of a Secret in the namespace of the model."
    )
    config_map_key_ref: KeySelector | None = Field(
        None, description="A key of a ConfigMap in the namespace of the model."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.secret_key_ref is None) == (self.config_map_key_ref is None):
            got = "both" if self.secret_key_ref else None
            expected = "exactly one of secretKeyRef and configMapKeyRef"
            raise validation_error("secretKeyRef", got=got, expected=expected)
        return self


class EnvVar(ApiModel):
    """An environment variable of a container."""

    model_config = model_validations(
        cel_rule(
            "!(has(self.value) && has(self.valueFrom))", "expected value or valueFrom, not both"
        )
    )

    name: EnvVarName = Field(description="Name of the variable.")
    value: EnvVarValue | None = Field(None, description="Value of the variable.")
    value_from: EnvVarSource | None = Field(None, description="Where the value is read from.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.value is not None and self.value_from is not None:
            raise validation_error("value", got=self.value, expected="none together with valueFrom")
        return self


def validate_env_names(names: Sequence[str]) -> None:
    """Raise a validation error for a reserved or duplicate name."""
    for index, name in enumerate(names):
        if name.startswith(RESERVED_PREFIX):
            expected = f"a name without the prefix {RESERVED_PREFIX}"
            raise validation_error(f"env.{index}.name", got=name, expected=expected)
    validate_unique("env", names, key="name")


RESERVED_KEY_PREFIXES = ("faasmoe.dev/", "app.kubernetes.io/")
_RESERVED_PREFIXES_TEXT = " and ".join(RESERVED_KEY_PREFIXES)

ResourceList = Annotated[dict[LabelKey, Quantity], Field(max_length=16)]
UnvalidatedObject = Annotated[
    dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})
]


def _cel_no_reserved_keys() -> SchemaExtension:
    condition = " && ".join(f"!key.startsWith('{prefix}')" for prefix in RESERVED_KEY_PREFIXES)
    message = (
        f"expected keys without the prefixes {_RESERVED_PREFIXES_TEXT}, which are the operator's"
    )
    return validations(
        cel_rule(f"self.all(key, {condition})", message, reason="FieldValueForbidden")
    )


class ResourceRequirements(ApiModel):
    """Resource requests and limits of a container."""

    model_config = model_validations(
        cel_rule(
            "!has(self.requests) || !has(self.limits) || self.requests.all(name, "
            "!(name in self.limits) || quantity(string(self.requests[name]))"
            ".compareTo(quantity(string(self.limits[name]))) <= 0)",
            "expected no request above the limit of the same resource",
            field=".requests",
        )
    )

    requests: ResourceList | None = Field(
        None, description="Amounts that the scheduler reserves for it."
    )
    limits: ResourceList | None = Field(None, description="Maximum amounts that it may use.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        limits = self.limits or {}
        for name, request in (self.requests or {}).items():
            limit = limits.get(name, request)
            if parse_quantity(request) > parse_quantity(limit):
                expected = f"at most the limit ({limit})"
                raise validation_error(f"requests.{name}", got=request, expected=expected)
        return self


class Toleration(ApiModel):
    """A taint of nodes that the pods tolerate."""

    model_config = model_validations(
        cel_rule(
            "self.operator != 'Exists' || !has(self.value)",
            "expected no value with the operator Exists, which matches every value",
        ),
        cel_rule(
            "has(self.key) || self.operator == 'Exists'",
            "expected a key, or the operator Exists for every taint",
        ),
    )

    key: LabelKey | None = Field(None, description="Key of the taint; every taint if omitted.")
    operator: Literal["Exists", "Equal"] = Field(
        "Equal", description="Whether the value has to be equal, or the key only has to exist."
    )
    value: LabelValue | None = Field(None, description="Value of the taint.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="Effect of the taint; every effect if omitted."
    )
    toleration_seconds: Annotated[int, Field(ge=0, le=1_000_000_000)] | None = Field(
        None, description="How long pods stay on a node with a NoExecute taint; forever if omitted."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.operator == "Exists" and self.value is not None:
            raise validation_error(
                "value", got=self.value, expected="none with the operator Exists"
            )
        if self.operator != "Exists" and self.key is None:
            raise validation_error("key", got=None, expected="a key, or the operator Exists")
        return self


class Affinity(ApiModel):
    """Kubernetes' affinity, copied to the pods without validation."""

    node_affinity: UnvalidatedObject | None = Field(
        None, description="Nodes that the pods need or prefer."
    )
    pod_affinity: UnvalidatedObject | None = Field(
        None, description="Pods that they need or prefer to run beside."
    )
    pod_anti_affinity: UnvalidatedObject | None = Field(
        None, description="Pods that they must not or should not run beside."
    )


class TopologySpreadConstraint(ApiModel):
    """How evenly the pods of a model are spread over nodes or zones."""

    topology_key: LabelKey = Field(
        description="Label of nodes whose values the pods are spread over."
    )
    max_skew: int = Field(
        1, ge=1, le=1000, description="Greatest difference between the pods of two values."
    )
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"] = Field(
        "ScheduleAnyway",
        description="Whether pods wait, or are placed anyway, if the skew would be exceeded.",
    )


class PodTemplateSpec(ApiModel):
    """Settings of pods. Kubernetes only."""

    model_config = model_validations(
        cel_rule(
            "!has(self.volumeMounts) || self.volumeMounts.all(mount, has(self.volumes) && "
            "self.volumes.exists(volume, volume.name == mount.name))",
            "expected each name to be that of one of volumes",
            field=".volumeMounts",
        )
    )

    labels: Labels | None = Field(
        None,
        json_schema_extra=_cel_no_reserved_keys(),
        description="Additional labels of the pods.",
    )
    annotations: Annotations | None = Field(
        None,
        json_schema_extra=_cel_no_reserved_keys(),
        description="Additional annotations of the pods.",
    )
    resources: ResourceRequirements | None = Field(
        None, description="Resources of the container; the operator's defaults if omitted."
    )
    node_selector: Labels | None = Field(None, description="Labels that nodes must have.")
    tolerations: tuple[Toleration, ...] = Field(
        (), strict=False, max_length=32, description="Taints of nodes that the pods tolerate."
    )
    affinity: Affinity | None = Field(
        None, description="Nodes and pods that the pods are placed by."
    )
    topology_spread_constraints: tuple[TopologySpreadConstraint, ...] = Field(
        (),
        strict=False,
        max_length=8,
        json_schema_extra=list_type_map("topologyKey"),
        description="How evenly the pods are spread.",
    )
    priority_class_name: ObjectName | None = Field(None, description="PriorityClass of the pods.")
    runtime_class_name: ObjectName | None = Field(None, description="RuntimeClass of the pods.")
    image: Annotated[str, Field(pattern=patterns.IMAGE, max_length=512)] | None = Field(
        None, description="Container image; the operator's default for these pods if omitted."
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        None, description="When the image is pulled; the operator's default if omitted."
    )
    image_pull_secrets: tuple[LocalObjectReference, ...] = Field(
        (),
        strict=False,
        max_length=8,
        json_schema_extra=list_type_map("name"),
        description="Secrets with credentials of registries.",
    )
    env: tuple[EnvVar, ...] = Field(
        (),
        strict=False,
        max_length=MAX_ENV_VARS,
        json_schema_extra=ENV_LIST_TYPE,
        description="Additional environment variables of the container.",
    )
    volumes: tuple[Volume, ...] = Field(
        (),
        strict=False,
        max_length=8,
        json_schema_extra=list_type_map("name"),
        description="Additional volumes of the pods.",
    )
    volume_mounts: tuple[VolumeMount, ...] = Field(
        (),
        strict=False,
        max_length=8,
        json_schema_extra=list_type_map("mountPath"),
        description="Where the container sees these volumes.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        _validate_volumes(self.volumes, self.volume_mounts)
        _validate_no_reserved_keys("labels", self.labels)
        _validate_no_reserved_keys("annotations", self.annotations)
        validate_env_names([variable.name for variable in self.env])
        secrets = [secret.name for secret in self.image_pull_secrets]
        validate_unique("imagePullSecrets", secrets, key="name")
        keys = [spread.topology_key for spread in self.topology_spread_constraints]
        validate_unique("topologySpreadConstraints", keys, key="topologyKey")
        return self


def _validate_volumes(volumes: Sequence[Volume], mounts: Sequence[VolumeMount]) -> None:
    names = [volume.name for volume in volumes]
    validate_unique("volumes", names, key="name")
    validate_unique("volumeMounts", [mount.mount_path for mount in mounts], key="mountPath")
    for index, mount in enumerate(mounts):
        if mount.name not in names:
            expected = f"the name of one of volumes ({', '.join(names) or 'there are none'})"
            raise validation_error(f"volumeMounts.{index}.name", got=mount.name, expected=expected)


def _validate_no_reserved_keys(field: str, entries: Mapping[str, str] | None) -> None:
    for key in entries or ():
        if key.startswith(RESERVED_KEY_PREFIXES):
            expected = (
                f"a key without the prefixes {_RESERVED_PREFIXES_TEXT}, which are the operator's"
            )
            raise validation_error(f"{field}.{key}", got=key, expected=expected)
