"""The MoEModel: one Mixture-of-Experts model and how it is served.

The same models read a file for `faasmoe up`, read the objects of the Kubernetes API, and are the
source of the CRD. An unknown key is refused, never ignored; what one platform alone honours is
marked, and told on the other (`platform.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from faasmoe_operator.errors import MoEModelError
from faasmoe_operator.spec.base import Part
from faasmoe_operator.spec.experts import Experts, Granularity
from faasmoe_operator.spec.extensions import KUBERNETES_ONLY
from faasmoe_operator.spec.model_source import ModelSource
from faasmoe_operator.spec.monitoring import Monitoring
from faasmoe_operator.spec.networking import Networking
from faasmoe_operator.spec.platform import kubernetes_problems
from faasmoe_operator.spec.problems import describe
from faasmoe_operator.spec.references import Label
from faasmoe_operator.spec.router import Router
from faasmoe_operator.spec.store import Store
from faasmoe_operator.spec.tenants import MAX_TENANTS, TENANTS, Tenant, check_tenants

API_VERSION = "faasmoe.dev/v1alpha1"
KIND = "MoEModel"
_TAKEN = ("name", "namespace", "labels", "annotations")


class Metadata(Part):
    """What Kubernetes calls the object; `name` is also the model's name in the OpenAI API."""

    name: Label
    namespace: Label | None = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


def _auto(value: Any) -> Any:
    return {} if value == "auto" else value


class ModelSpec(Part):
    """What is asked for."""

    model: ModelSource
    store: Store = Field(default_factory=lambda: Store.model_validate({}))
    granularity: Annotated[Granularity, BeforeValidator(_auto)] = Field(
        default_factory=lambda: Granularity.model_validate({})
    )
    router: Router = Field(default_factory=lambda: Router.model_validate({}))
    experts: Experts = Field(default_factory=lambda: Experts.model_validate({}))
    tenants: tuple[Tenant, ...] = Field(
        (),
        strict=False,
        max_length=MAX_TENANTS,
        description="Who may use the model; everyone who reaches it if left out.",
        json_schema_extra=TENANTS,
    )
    networking: Networking = Field(
        default_factory=lambda: Networking.model_validate({}), json_schema_extra=KUBERNETES_ONLY
    )
    monitoring: Monitoring = Field(
        default_factory=lambda: Monitoring.model_validate({}), json_schema_extra=KUBERNETES_ONLY
    )
    suspend: bool = Field(
        False,
        description="Takes away every pod of the model, and keeps its store.",
        json_schema_extra=KUBERNETES_ONLY,
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_tenants(self.tenants)
        return self


class MoEModel(Part):
    """One model and how it is served."""

    api_version: Literal["faasmoe.dev/v1alpha1"]
    kind: Literal["MoEModel"]
    metadata: Metadata
    spec: ModelSpec

    @classmethod
    def from_object(cls, obj: Mapping[str, Any]) -> Self:
        """Check an object of the Kubernetes API; raises MoEModelError.

        Args:
            obj: the object; its status and what the API server adds to its metadata are left out.
        """
        metadata = {name: obj["metadata"][name] for name in _TAKEN if name in obj["metadata"]}
        value = {name: obj[name] for name in ("apiVersion", "kind", "spec") if name in obj}
        called = "/".join(metadata[part] for part in ("namespace", "name") if part in metadata)
        try:
            model = cls.model_validate(_plain({**value, "metadata": metadata}))
        except ValidationError as error:
            raise MoEModelError(called, describe(error, cls)) from error
        if problems := kubernetes_problems(model):
            raise MoEModelError(called, problems)
        return model

    @property
    def store_sub_path(self) -> str:
        """The store's folder in its claim."""
        return self.spec.store.sub_path or self.metadata.name


def _plain(value: Any) -> Any:
    """Return a copy in dicts and lists, of whatever mappings and sequences an API client reads."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
