"""Inputs of the manifests, and the metadata that all objects of a MoEModel have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from faasmoe_operator.api.v1alpha1 import MoEModel
from faasmoe_operator.api.v1alpha1.moemodel import MoEModelSpec
from faasmoe_operator.api.v1alpha1.tenants import TenantSpec
from faasmoe_operator.kube.manifests.names import Component, model_labels
from faasmoe_operator.kube.store_summary import StoreSummary
from faasmoe_operator.kube.types import Kind, Object

USER_ID = 65532
"""User and group of the images; the user owns no files in them."""
GATEWAY_API = "gateway.networking.k8s.io/v1"
MONITORING_API = "monitoring.coreos.com/v1"


@dataclass(frozen=True, slots=True)
class Images:
    """Default images, used unless a MoEModel sets its own.

    Attributes:
        router: image of routers and the store Job.
        expert: image of sandboxes.
        pull_policy: imagePullPolicy.
        pull_secrets: names of image pull Secrets in the model's namespace.
    """

    router: str
    expert: str
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ControlEndpoint:
    """The operator's control API, as routers reach it and as NetworkPolicies select it.

    Attributes:
        url: in-cluster URL without a path.
        namespace: namespace of the operator's pods.
        pod_labels: labels that select them.
        port: port that they listen on.
    """

    url: str
    namespace: str
    pod_labels: Mapping[str, str]
    port: int


@dataclass(frozen=True, slots=True)
class GatewayPods:
    """The gateways' pods, as NetworkPolicies select them.

    Attributes:
        namespace: their namespace.
        pod_labels: labels that select them.
    """

    namespace: str
    pod_labels: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class ControlSecrets:
    """Secrets of one model.

    Attributes:
        token: bearer token of its control API and its sandboxes.
        function_key: key from which function ids are derived, in hexadecimal; never leaves the
            operator.
        front_token: what gateways show its routers; empty if no gateway runs.
    """

    token: str = field(repr=False)
    function_key: str = field(repr=False)
    front_token: str = field(default="", repr=False)

    @property
    def digest(self) -> str:
        """Hash of the tokens."""
        return hashlib.sha256((self.token + self.front_token).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class ModelContext:
    """One MoEModel and everything else that its manifests depend on.

    Attributes:
        model: the parsed MoEModel.
        namespace: its namespace.
        uid: its uid, for owner references.
        generation: generation of its spec.
        images: default images.
        control: the operator's control API.
        secrets: the model's token and function key.
        summary: summary of the prepared store; None until it is prepared.
        served_apis: optional APIs that the cluster serves, such as "gateway.networking.k8s.io/v1".
        user_id: user and group of the pods; None if the platform assigns them.
        can_resize: whether the cluster resizes pods in place.
        gateways: the gateways' pods; None if no gateway runs.
        tenants: Tenants that may use the model, by the gateways alone.
        scaled_routers: routers that should run by the model's requests; None if they are not
            counted.
        tls_secret: name of the Secret with the certificate of the namespace's models; None for pods
            without TLS.
    """

    model: MoEModel
    namespace: str
    uid: str
    generation: int
    images: Images
    control: ControlEndpoint
    secrets: ControlSecrets
    summary: StoreSummary | None = None
    served_apis: frozenset[str] = frozenset()
    user_id: int | None = USER_ID
    can_resize: bool = False
    gateways: GatewayPods | None = None
    tenants: tuple[TenantSpec, ...] = ()
    scaled_routers: int | None = None
    tls_secret: str | None = None

    @property
    def router_replicas(self) -> int:
        """Routers that should run."""
        if self.spec.suspend:
            return 0
        scaling = self.spec.router.scaling
        if scaling is None:
            return self.spec.router.replicas
        if self.scaled_routers is not None:
            return self.scaled_routers
        return max(1, scaling.min_replicas)  # nobody would start it

    @property
    def has_tenants(self) -> bool:
        """Whether routers know tenants, so that nobody else may call them."""
        return bool(self.spec.tenants or self.tenants)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.metadata.name

    @property
    def spec(self) -> MoEModelSpec:
        """The model's spec."""
        return self.model.spec

    @property
    def control_url(self) -> str:
        """URL of this model's control API."""
        return f"{self.control.url}/models/{self.namespace}/{self.name}"

    @property
    def owner_reference(self) -> dict[str, Any]:
        """Owner reference to this MoEModel, so that owned objects are garbage-collected."""
        return {
            "apiVersion": self.model.api_version,
            "kind": self.model.kind,
            "name": self.name,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }


def new_object(
    ctx: ModelContext,
    kind: Kind,
    name: str,
    *,
    component: Component | None = None,
    extra_labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    owned: bool = True,
    **body: Any,
) -> Object:
    """Return an object of this model.

    Args:
        ctx: the model.
        kind: the object's kind.
        name: the object's name.
        component: the component that it belongs to; None for the whole model.
        extra_labels: labels besides those of every object.
        annotations: annotations.
        owned: whether it is deleted with the MoEModel.
        body: fields other than kind and metadata.
    """
    metadata: Object = {
        "name": name,
        "namespace": ctx.namespace,
        "labels": {**model_labels(ctx.name, component), **(extra_labels or {})},
    }
    if annotations:
        metadata["annotations"] = dict(annotations)
    if owned:
        metadata["ownerReferences"] = [ctx.owner_reference]
    return {"apiVersion": kind.api_version, "kind": kind.name, "metadata": metadata, **body}
