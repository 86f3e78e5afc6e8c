"""How clients reach the router from outside, and which pods may reach it. Kubernetes only."""

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

    host: HostName
    class_name: ObjectName | None = Field(None, description="The cluster's default if left out.")
    tls_secret_name: ObjectName | None = Field(
        None, description="Secret with the certificate; plain HTTP if left out."
    )
    annotations: Annotations | None = Field(None, description="For the ingress controller.")


class ParentReference(ApiModel):
    """A Gateway that the route is attached to."""

    name: ObjectName
    namespace: DNSLabel | None = Field(None, description="The model's own if left out.")
    section_name: ObjectName | None = Field(None, description="One listener; all if left out.")


class HTTPRouteSpec(ApiModel):
    """An HTTPRoute of the Gateway API for the model and its tenants."""

    hostnames: Annotated[tuple[HostName, ...], Field(strict=False, max_length=16)] = Field(
        (), description="The listeners' own if left out.", json_schema_extra=LIST_TYPE_SET
    )
    parent_refs: tuple[ParentReference, ...] = Field(strict=False, min_length=1, max_length=8)

    @model_validator(mode="after")
    def _check(self) -> Self:
        validate_unique("hostnames", self.hostnames)
        return self


class LabelSelector(ApiModel):
    """Objects that carry all of these labels; every object if there are none."""

    match_labels: Labels = Field(default_factory=dict)


class NetworkPolicyPeer(ApiModel):
    """Pods that may reach the router."""

    model_config = model_validations(
        cel_rule(
            "has(self.namespaceSelector) || has(self.podSelector)",
            "expected namespaceSelector, podSelector or both",
        )
    )

    namespace_selector: LabelSelector | None = Field(
        None, description="Their namespaces; the model's own if left out."
    )
    pod_selector: LabelSelector | None = Field(
        None, description="The pods; every pod of the namespaces if left out."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.namespace_selector is None and self.pod_selector is None:
            expected = "namespaceSelector, podSelector or both to be given"
            raise validation_error("namespaceSelector", got=None, expected=expected)
        return self


class NetworkingSpec(ApiModel):
    """How the router is reached beyond its Services."""

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
        description="Pods that may reach the router; every pod of the cluster if left out.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.ingress is not None and self.http_route is not None:
            raise validation_error("httpRoute", got={}, expected="none beside ingress")
        return self
