"""Additional volumes of pods, of sources that give no access beyond the model's namespace."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from faasmoe_operator.api.v1alpha1 import patterns
from faasmoe_operator.api.v1alpha1.base import (
    ApiModel,
    cel_rule,
    model_validations,
    validation_error,
    validations,
)
from faasmoe_operator.api.v1alpha1.field_types import ByteQuantity, DNSLabel, ObjectName

SOURCES = ("configMap", "secret", "persistentVolumeClaim", "emptyDir")
RESERVED_PATHS = (
    "/store",
    "/source",
    "/cache",
    "/tmp",
    "/etc/faasmoe",
    "/var/lib/faasmoe",
    "/opt/faasmoe",
)
"""Where the operator's own volumes and the images' files are."""
_ONE_SOURCE = f"expected exactly one of {', '.join(SOURCES)}"
_OTHER_PATH = f"expected a path outside {', '.join(RESERVED_PATHS)}"


class ConfigMapVolume(ApiModel):
    """The keys of a ConfigMap as files."""

    name: ObjectName = Field(description="Name of the ConfigMap.")


class SecretVolume(ApiModel):
    """The keys of a Secret as files."""

    secret_name: ObjectName = Field(description="Name of the Secret.")


class ClaimVolume(ApiModel):
    """The content of a PersistentVolumeClaim."""

    claim_name: ObjectName = Field(description="Name of the claim.")


class EmptyDirVolume(ApiModel):
    """A folder that is empty at the start and deleted with the pod."""

    size_limit: ByteQuantity | None = Field(
        None, description="Size above which the pod is evicted; none if omitted."
    )


class Volume(ApiModel):
    """A volume in the namespace of the model."""

    model_config = model_validations(
        cel_rule(f"[{', '.join(f'has(self.{s})' for s in SOURCES)}].exists_one(s, s)", _ONE_SOURCE)
    )

    name: DNSLabel = Field(description="Name of the volume.")
    config_map: ConfigMapVolume | None = None
    secret: SecretVolume | None = None
    persistent_volume_claim: ClaimVolume | None = None
    empty_dir: EmptyDirVolume | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name in SOURCES if name in self.to_object()]
        if len(given) != 1:
            raise validation_error(
                "name", got=given, expected=_ONE_SOURCE.removeprefix("expected ")
            )
        return self


_MountPath = Annotated[
    str,
    Field(
        pattern=patterns.ABSOLUTE_PATH,
        max_length=512,
        json_schema_extra=validations(
            cel_rule(
                " && ".join(
                    f"self != '{path}' && !self.startsWith('{path}/')" for path in RESERVED_PATHS
                ),
                _OTHER_PATH,
                reason="FieldValueForbidden",
            )
        ),
    ),
]


class VolumeMount(ApiModel):
    """Where a container sees a volume."""

    name: DNSLabel = Field(description="Name of the volume.")
    mount_path: _MountPath = Field(description="Absolute path in the container.")
    sub_path: Annotated[str, Field(pattern=patterns.RELATIVE_PATH, max_length=512)] | None = Field(
        None, description="File or folder of the volume to mount; all of it if omitted."
    )
    read_only: bool = Field(True, description="Whether the container may only read.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        path = self.mount_path
        if any(path == reserved or path.startswith(f"{reserved}/") for reserved in RESERVED_PATHS):
            raise validation_error(
                "mountPath", got=path, expected=_OTHER_PATH.removeprefix("expected ")
            )
        return self
