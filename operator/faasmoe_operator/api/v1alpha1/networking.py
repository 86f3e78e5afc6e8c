"""External access to the router and its network policy. Kubernetes only."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from faasmoe_operator.api.v1alpha1.base import (
    LIST_TYPE_SET,
    ApiModel,
    cel_rule,
    model_validations,
    validate_unique,
    validation_error,
)
from faasmoe_operator.api.v1alpha1.field_types import Annotations, DNSLabel, Labels, ObjectName

HostName = ObjectName


class IngressSpec(ApiModel):
    """An Ingress for the model and its tenants."""

    host: HostName = Field(description="Host name of the Ingress.")
    class_name: ObjectName | None = Field(
        None, description="Ingress class; the cluster's default if omitted."
    )
    tls_secret_name: ObjectName | None = Field(
        None, description="Secret with the certificate; plain HTTP if omitted."
    )
    annotations: Annotations | None = Field(
        None, description="Annotations for the ingress controller."
    )


class ParentReference(ApiModel):
    """A Gateway that the route is attached to."""

    name: ObjectName = Field(description="Name of the Gateway.")
    namespace: DNSLabel | None = Field(
        None, description="Namespace of the Gateway; the model's own if omitted."
    )
    section_name: ObjectName | None = Field(
        None, description="Name of one listener; all listeners if omitted."
    )


class HTTPRouteSpec(ApiModel):
    """An HTTPRoute of the Gateway API for the model and its tenants."""

    hostnames: Annotated[tuple[HostName, ...], Field(strict=False, max_length=16)] = Field(
        (),
        description="Host names of the route; the listeners' own if omitted.",
        json_schema_extra=LIST_TYPE_SET,
    )
    parent_refs: tuple[ParentReference, ...] = Field(
        strict=False,
        min_length=1,
        max_length=8,
        description="Gateways that the route is attached to.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        validate_unique("hostnames", self.hostnames)
        return self


class LabelSelector(ApiModel):
    """Selects objects that have all of these labels; without labels, every object."""

    match_labels: Labels = Field(default_factory=dict, description="Labels that must be equal.")


class NetworkPolicyPeer(ApiModel):
    """Pods that may connect."""

    model_config = model_validations(
        cel_rule(
            "has(self.namespaceSelector) || has(self.podSelector)",
            "expected namespaceSelector, podSelector or both",
        )
    )

    namespace_selector: LabelSelector | None = Field(
        None, description="Namespaces of the pods; the model's own if omitted."
    )
    pod_selector: LabelSelector | None = Field(
        None, description="The pods; every pod of the namespaces if omitted."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.namespace_selector is None and self.pod_selector is None:
            expected = "namespaceSelector, podSelector or both to be given"
            raise validation_error("namespaceSelector", got=None, expected=expected)
        return self


class NetworkingSpec(ApiModel):
    """Access to the router in addition to its Services."""

    model_config = model_validations(
        cel_rule(
            "!(has(self.ingress) && has(self.httpRoute))",
            "expected ingress or httpRoute, not both",
            field=".httpRoute",
        )
    )

    ingress: IngressSpec | None = None
    http_route: HTTPRouteSpec | None = None
    clients: tuple[NetworkPolicyPeer, ...] = Field(
        (),
        strict=False,
        max_length=32,
        description="Pods that may reach the router; every pod of the cluster if omitted.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.ingress is not None and self.http_route is not None:
            raise validation_error("httpRoute", got={}, expected="none together with ingress")
        return self
