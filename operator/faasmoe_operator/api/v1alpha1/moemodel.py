"""The MoEModel: a Mixture-of-Experts model and how it is served; parsed from YAML or Kubernetes.

The same types parse the file of `faasmoe up` and the objects of the Kubernetes API, and generate
the CRD. Unknown keys are rejected. Fields that only one platform supports are marked; the other
platform warns about them or rejects them (`validation.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from faasmoe_contracts.control_messages import MAX_TENANTS
from faasmoe_operator.api.v1alpha1.base import KUBERNETES_ONLY, ApiModel
from faasmoe_operator.api.v1alpha1.experts import ExpertsSpec, GranularitySpec
from faasmoe_operator.api.v1alpha1.field_types import DNSLabel
from faasmoe_operator.api.v1alpha1.monitoring import MonitoringSpec
from faasmoe_operator.api.v1alpha1.networking import NetworkingSpec
from faasmoe_operator.api.v1alpha1.router import RouterSpec
from faasmoe_operator.api.v1alpha1.storage import ModelSource, StoreSpec
from faasmoe_operator.api.v1alpha1.tenants import (
    TENANTS_LIST_TYPE,
    TenantSpec,
    validate_tenants,
)
from faasmoe_operator.api.v1alpha1.tracing import TracingSpec
from faasmoe_operator.api.v1alpha1.validation import format_validation_errors, kubernetes_problems
from faasmoe_operator.api.v1alpha1.yaml_documents import parse_documents, read_text
from faasmoe_operator.errors import MoEModelError

API_VERSION = "faasmoe.dev/v1alpha1"
KIND = "MoEModel"
_METADATA_FIELDS = ("name", "namespace", "labels", "annotations")


class ObjectMeta(ApiModel):
    """Metadata of the object; `name` is also the model's name in the OpenAI API."""

    name: DNSLabel
    namespace: DNSLabel | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


def _expand_auto(value: Any) -> Any:
    return {} if value == "auto" else value


class MoEModelSpec(ApiModel):
    """Desired state of the model."""

    model: ModelSource
    store: StoreSpec = Field(default_factory=lambda: StoreSpec.model_validate({}))
    granularity: Annotated[GranularitySpec, BeforeValidator(_expand_auto)] = Field(
        default_factory=lambda: GranularitySpec.model_validate({})
    )
    router: RouterSpec = Field(default_factory=lambda: RouterSpec.model_validate({}))
    experts: ExpertsSpec = Field(default_factory=lambda: ExpertsSpec.model_validate({}))
    tenants: tuple[TenantSpec, ...] = Field(
        (),
        strict=False,
        max_length=MAX_TENANTS,
        description="Tenants that may use the model. If omitted, everyone may who can reach it.",
        json_schema_extra=TENANTS_LIST_TYPE,
    )
    networking: NetworkingSpec = Field(
        default_factory=lambda: NetworkingSpec.model_validate({}), json_schema_extra=KUBERNETES_ONLY
    )
    monitoring: MonitoringSpec = Field(
        default_factory=lambda: MonitoringSpec.model_validate({}), json_schema_extra=KUBERNETES_ONLY
    )
    tracing: TracingSpec | None = Field(
        None, description="Where the model's traces go; omit for none."
    )
    suspend: bool = Field(
        False,
        description="Deletes all pods of the model and keeps its store.",
        json_schema_extra=KUBERNETES_ONLY,
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        validate_tenants(self.tenants)
        return self


class MoEModel(ApiModel):
    """A Mixture-of-Experts model and how it is served."""

    api_version: Literal["faasmoe.dev/v1alpha1"]
    kind: Literal["MoEModel"]
    metadata: ObjectMeta
    spec: MoEModelSpec

    @classmethod
    def from_object(cls, obj: Mapping[str, Any]) -> Self:
        """Parse an object of the Kubernetes API.

        Args:
            obj: the object; its status and other metadata fields are ignored.

        Raises:
            MoEModelError: the object is invalid or uses fields of the process platform.
        """
        raw_metadata = obj.get("metadata", {})
        metadata = {name: raw_metadata[name] for name in _METADATA_FIELDS if name in raw_metadata}
        value = {name: obj[name] for name in ("apiVersion", "kind", "spec") if name in obj}
        object_name = f"{raw_metadata.get('namespace', 'default')}/{raw_metadata.get('name', '')}"
        try:
            model = cls.model_validate(_to_builtin({**value, "metadata": metadata}))
        except ValidationError as error:
            raise MoEModelError(object_name, format_validation_errors(error, cls)) from error
        if problems := kubernetes_problems(model):
            raise MoEModelError(object_name, problems)
        return model

    @property
    def store_sub_path(self) -> str:
        """The store's folder in its claim or image; empty for the root of an image."""
        store = self.spec.store
        return store.sub_path or ("" if store.image is not None else self.metadata.name)


def _to_builtin(value: Any) -> Any:
    """Return a copy that consists of dicts and lists, of any mappings and sequences."""
    if isinstance(value, Mapping):
        return {key: _to_builtin(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_to_builtin(entry) for entry in value]
    return value


def load_moemodel(path: Path) -> MoEModel:
    """Read and validate a MoEModel file; raises MoEModelError."""
    return parse_moemodel(read_text(path), name=str(path))


def parse_moemodel(text: str, *, name: str) -> MoEModel:
    """Parse and validate the text of a MoEModel file.

    Args:
        text: one YAML document.
        name: name of the text in error messages.

    Raises:
        MoEModelError: the text is no YAML or the model is invalid.
    """
    documents = parse_documents(text, name=name)
    if len(documents) > 1:
        raise MoEModelError(name, [f"got {len(documents)} documents, expected one"])
    value = documents[0] if documents else None
    if not isinstance(value, dict):
        kind = "nothing" if value is None else f"a {type(value).__name__}"
        raise MoEModelError(name, [f"document: got {kind}, expected a mapping"])
    try:
        return MoEModel.model_validate(value)
    except ValidationError as error:
        raise MoEModelError(name, format_validation_errors(error, MoEModel)) from error
