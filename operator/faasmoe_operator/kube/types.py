"""Types of the Kubernetes API: objects, keys, and the kinds that the operator reads or writes.

Kinds are static, not discovered; `client.py` says what discovery would cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of object.

    Attributes:
        api_version: group and version; `v1` for the core group.
        name: the `kind` field of its objects.
        plural: the resource name in paths.
        namespaced: whether its objects belong to namespaces.
    """

    api_version: str
    name: str
    plural: str
    namespaced: bool = True

    @property
    def group(self) -> str:
        """The API group; empty for the core group."""
        group, _, version = self.api_version.rpartition("/")
        return group if version else ""

    @property
    def version(self) -> str:
        """The version within the group."""
        return self.api_version.rpartition("/")[2]

    def __str__(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural


MOEMODEL = Kind("faasmoe.dev/v1alpha1", "MoEModel", "moemodels")
TENANT = Kind("faasmoe.dev/v1alpha1", "Tenant", "tenants")
POD = Kind("v1", "Pod", "pods")
POD_RESIZE = Kind("v1", "Pod", "pods/resize")
"""The subresource that resizes a pod in place, which Kubernetes serves since 1.33."""
SERVICE = Kind("v1", "Service", "services")
PERSISTENT_VOLUME_CLAIM = Kind("v1", "PersistentVolumeClaim", "persistentvolumeclaims")
CONFIG_MAP = Kind("v1", "ConfigMap", "configmaps")
SECRET = Kind("v1", "Secret", "secrets")
SERVICE_ACCOUNT = Kind("v1", "ServiceAccount", "serviceaccounts")
JOB = Kind("batch/v1", "Job", "jobs")
DEPLOYMENT = Kind("apps/v1", "Deployment", "deployments")
NETWORK_POLICY = Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies")
INGRESS = Kind("networking.k8s.io/v1", "Ingress", "ingresses")
POD_DISRUPTION_BUDGET = Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets")
LEASE = Kind("coordination.k8s.io/v1", "Lease", "leases")
EVENT = Kind("v1", "Event", "events")
HTTP_ROUTE = Kind("gateway.networking.k8s.io/v1", "HTTPRoute", "httproutes")
SERVICE_MONITOR = Kind("monitoring.coreos.com/v1", "ServiceMonitor", "servicemonitors")
POD_MONITOR = Kind("monitoring.coreos.com/v1", "PodMonitor", "podmonitors")

OWNED_KINDS = (
    PERSISTENT_VOLUME_CLAIM,
    SECRET,
    CONFIG_MAP,
    SERVICE_ACCOUNT,
    NETWORK_POLICY,
    SERVICE,
    POD_DISRUPTION_BUDGET,
    JOB,
    DEPLOYMENT,
    INGRESS,
    HTTP_ROUTE,
    SERVICE_MONITOR,
    POD_MONITOR,
)
OPTIONAL_KINDS = (HTTP_ROUTE, SERVICE_MONITOR, POD_MONITOR)
"""Kinds whose CRDs a cluster may lack."""
WATCHED_KINDS = (
    MOEMODEL,
    POD,
    *(kind for kind in OWNED_KINDS if kind not in (SECRET, *OPTIONAL_KINDS)),
)
"""Kinds that every cluster serves and the cache holds.

Secrets are not among them: those that Tenants name are read one by one.
"""

_KINDS_BY_GVK = {
    (kind.api_version, kind.name): kind
    for kind in (MOEMODEL, TENANT, POD, EVENT, LEASE, *OWNED_KINDS)
}


def kind_of(obj: Mapping[str, Any]) -> Kind:
    """Return the kind of an object; raises KeyError if the operator does not use it."""
    return _KINDS_BY_GVK[obj["apiVersion"], obj["kind"]]


class ObjectList(NamedTuple):
    """The objects of one kind at one moment.

    Attributes:
        objects: the objects.
        resource_version: the state they show; a watch can start from it.
    """

    objects: list[Object]
    resource_version: str


class WatchEvent(NamedTuple):
    """One event of a watch.

    Attributes:
        type: ADDED, MODIFIED, DELETED or BOOKMARK.
        object: the object after the change; its last state for DELETED. For BOOKMARK only
            `metadata.resourceVersion` is set.
    """

    type: str
    object: Object


class ModelKey(NamedTuple):
    """Namespace and name of a MoEModel."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"
