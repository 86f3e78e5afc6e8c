"""Everything that the objects of one MoEModel are made from.

What all objects of a MoEModel have in common: kind, name, labels, owner.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from faasmoe_operator.api.v1alpha1 import MoEModel
from faasmoe_operator.api.v1alpha1.moemodel import MoEModelSpec
from faasmoe_operator.kube.manifests.names import Component, model_labels
from faasmoe_operator.kube.store_summary import StoreSummary
from faasmoe_operator.kube.types import Kind, Object

GATEWAY_API = "gateway.networking.k8s.io/v1"
MONITORING_API = "monitoring.coreos.com/v1"


@dataclass(frozen=True, slots=True)
class Images:
    """What pods run when a MoEModel names no image itself.

    Attributes:
        router: image of routers and of the store's Job.
        expert: image of sandboxes.
        pull_policy: when a node pulls them.
        pull_secrets: names of Secrets, in the model's namespace, of a private registry.
    """

    router: str
    expert: str
    pull_policy: str = "IfNotPresent"
    pull_secrets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ControlEndpoint:
    """The operator's control API, as routers reach it and as NetworkPolicies name it.

    Attributes:
        url: its address within the cluster, without a path.
        namespace: where the operator's pods are.
        pod_labels: what selects them.
        port: the port that they listen on.
    """

    url: str
    namespace: str
    pod_labels: Mapping[str, str]
    port: int


@dataclass(frozen=True, slots=True)
class ControlSecrets:
    """What only one model's parts know.

    Attributes:
        token: bearer token of the control API and of the sandboxes.
        function_key: secret of the function ids (hexadecimal); stays in the operator.
    """

    token: str = field(repr=False)
    function_key: str = field(repr=False)

    @property
    def digest(self) -> str:
        """A hash that changes when the token does."""
        return hashlib.sha256(self.token.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class ModelContext:
    """One MoEModel and what surrounds it.

    Attributes:
        model: what is asked for.
        namespace: where it is.
        uid: the object's; owner references carry it.
        generation: of the spec.
        images: what pods run.
        control: the operator's control API.
        secrets: the model's token and function key.
        summary: what the prepared store holds; None until there is one.
        api: optional APIs that the cluster serves, such as "gateway.networking.k8s.io/v1".
    """

    model: MoEModel
    namespace: str
    uid: str
    generation: int
    images: Images
    control: ControlEndpoint
    secrets: ControlSecrets
    summary: StoreSummary | None = None
    api: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """The model's name."""
        return self.model.metadata.name

    @property
    def spec(self) -> MoEModelSpec:
        """What is asked for."""
        return self.model.spec

    @property
    def control_url(self) -> str:
        """Where this model's control API is."""
        return f"{self.control.url}/models/{self.namespace}/{self.name}"

    @property
    def owner_reference(self) -> dict[str, Any]:
        """What makes an object go with this MoEModel."""
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
        kind: what it is.
        name: its name.
        component: the part of the model that it belongs to.
        more_labels: labels beside those of every object.
        annotations: its annotations.
        owned: whether it goes when the MoEModel goes.
        body: all but kind and metadata.
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
