"""What a plan of the tenants is made from: Tenants, models and routers as they are in the cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from faasmoe_contracts.gateway_file import RouterEntry
from faasmoe_operator.api.v1alpha1.router import API_PORT
from faasmoe_operator.api.v1alpha1.tenant import Tenant
from faasmoe_operator.errors import MoEModelError
from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.manifests.names import COMPONENT_LABEL, MODEL_LABEL, Component
from faasmoe_operator.kube.types import MOEMODEL, POD, TENANT, ModelKey, Object


@dataclass(frozen=True, slots=True)
class ObservedTenant:
    """A Tenant of the cluster.

    Attributes:
        key: its namespace and name.
        obj: its API object.
        tenant: the parsed Tenant; None if it is invalid.
        problems: what is invalid.
    """

    key: ModelKey
    obj: Object = field(repr=False)
    tenant: Tenant | None
    problems: tuple[str, ...] = ()

    @property
    def age_order(self) -> tuple[str, str, str]:
        """What older Tenants have less of."""
        return (self.obj["metadata"].get("creationTimestamp", ""), *self.key)


@dataclass(frozen=True, slots=True)
class ObservedModel:
    """A MoEModel of the cluster.

    Attributes:
        key: its namespace and name.
        uid: its uid.
        labels: its labels.
        served_name: its name in requests.
        max_model_len: tokens of a prompt and its completion; None until the store is prepared.
        routers: its routers that take requests.
        own_tenants: names of the tenants of its spec.
    """

    key: ModelKey
    uid: str
    labels: Mapping[str, str]
    served_name: str
    max_model_len: int | None
    routers: tuple[RouterEntry, ...] = ()
    own_tenants: frozenset[str] = frozenset()

    @property
    def name(self) -> str:
        """Its name in the gateway's file, unique in the cluster."""
        return str(self.key)


def observe_tenants(cache: ObjectCache) -> list[ObservedTenant]:
    """Return all Tenants that are not being deleted, older ones first."""
    found = [
        _observed_tenant(obj)
        for obj in cache.list_all(TENANT)
        if "deletionTimestamp" not in obj["metadata"]
    ]
    return sorted(found, key=lambda tenant: tenant.age_order)


def _observed_tenant(obj: Object) -> ObservedTenant:
    key = ModelKey(obj["metadata"]["namespace"], obj["metadata"]["name"])
    try:
        return ObservedTenant(key, obj, Tenant.from_object(obj))
    except MoEModelError as error:
        return ObservedTenant(key, obj, None, tuple(error.problems))


def observe_models(cache: ObjectCache) -> list[ObservedModel]:
    """Return all MoEModels that are not being deleted, by namespace and name."""
    routers = _ready_routers(cache.list_all(POD))
    found = [
        _observed_model(obj, routers)
        for obj in cache.list_all(MOEMODEL)
        if "deletionTimestamp" not in obj["metadata"]
    ]
    return sorted(found, key=lambda model: model.key)


def _observed_model(
    obj: Object, routers: Mapping[ModelKey, tuple[RouterEntry, ...]]
) -> ObservedModel:
    metadata, spec = obj["metadata"], obj.get("spec", {})
    router: Mapping[str, Any] = spec.get("router") or {}
    stored = obj.get("status", {}).get("model") or {}
    key = ModelKey(metadata["namespace"], metadata["name"])
    length = stored.get("maxPositionEmbeddings")
    if length is not None and router.get("maxModelLen") is not None:
        length = min(length, router["maxModelLen"])
    return ObservedModel(
        key,
        metadata["uid"],
        metadata.get("labels") or {},
        router.get("servedModelName") or key.name,
        length,
        routers.get(key, ()),
        frozenset(tenant["name"] for tenant in spec.get("tenants") or ()),
    )


def _ready_routers(pods: Iterable[Object]) -> dict[ModelKey, tuple[RouterEntry, ...]]:
    found: dict[ModelKey, list[RouterEntry]] = {}
    for pod in pods:
        model = router_model(pod)
        address = pod.get("status", {}).get("podIP")
        if model is None or not address or not _is_ready(pod):
            continue
        host = f"[{address}]" if ":" in address else address
        router = RouterEntry(pod["metadata"]["name"], f"{host}:{API_PORT}")
        found.setdefault(model, []).append(router)
    return {key: tuple(sorted(routers, key=lambda r: r.name)) for key, routers in found.items()}


def router_model(pod: Object) -> ModelKey | None:
    """Return the model of a router pod; None for any other pod."""
    metadata = pod["metadata"]
    labels = metadata.get("labels") or {}
    if labels.get(COMPONENT_LABEL) != Component.ROUTER or MODEL_LABEL not in labels:
        return None
    return ModelKey(metadata["namespace"], labels[MODEL_LABEL])


def _is_ready(pod: Object) -> bool:
    if "deletionTimestamp" in pod["metadata"]:
        return False
    return any(
        condition.get("type") == "Ready" and condition.get("status") == "True"
        for condition in pod.get("status", {}).get("conditions", ())
    )
