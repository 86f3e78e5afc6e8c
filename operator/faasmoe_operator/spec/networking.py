"""How clients reach the router from outside, and which pods may reach it. Kubernetes only."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from faasmoe_operator.spec.base import Part, check_unique, rule_broken
from faasmoe_operator.spec.extensions import SET, cel, rules
from faasmoe_operator.spec.references import Annotations, Label, Labels, ObjectName

HostName = ObjectName


class Ingress(Part):
    """An Ingress for the model and its tenants."""

    host: HostName
    class_name: ObjectName | None = Field(None, description="The cluster's default if left out.")
    tls_secret_name: ObjectName | None = Field(
        None, description="Secret with the certificate; plain HTTP if left out."
    )
    annotations: Annotations | None = Field(None, description="For the ingress controller.")


class ParentReference(Part):
    """A Gateway that the route is attached to."""

    name: ObjectName
    namespace: Label | None = Field(None, description="The model's own if left out.")
    section_name: ObjectName | None = Field(None, description="One listener; all if left out.")


class HttpRoute(Part):
    """An HTTPRoute of the Gateway API for the model and its tenants."""

    hostnames: Annotated[tuple[HostName, ...], Field(strict=False, max_length=16)] = Field(
        (), description="The listeners' own if left out.", json_schema_extra=SET
    )
    parent_refs: tuple[ParentReference, ...] = Field(strict=False, min_length=1, max_length=8)

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_unique("hostnames", self.hostnames)
        return self


class LabelSelector(Part):
    """Objects that carry all of these labels; every object if there are none."""

    match_labels: Labels = Field(default_factory=dict)


class Client(Part):
    """Pods that may reach the router."""

    model_config = rules(
        cel(
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
            raise rule_broken("namespaceSelector", got=None, expected=expected)
        return self


class Networking(Part):
    """How the router is reached beyond its Services."""

    model_config = rules(
        cel(
            "!(has(self.ingress) && has(self.httpRoute))",
            "expected ingress or httpRoute, not both",
            field=".httpRoute",
        )
    )

    ingress: Ingress | None = None
    http_route: HttpRoute | None = None
    clients: tuple[Client, ...] = Field(
        (),
        strict=False,
        max_length=32,
        description="Pods that may reach the router; every pod of the cluster if left out.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.ingress is not None and self.http_route is not None:
            raise rule_broken("httpRoute", got={}, expected="none beside ingress")
        return self
