"""The kinds of objects that the operator reads or writes, and where the API serves them.

They are written down here and not discovered: see `client.py` for what discovery costs.

What names one MoEModel of the cluster.
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
        api_version: group and version, `v1` for the core group.
        name: the kind as objects call it.
        plural: the resource as paths call it.
        namespaced: whether its objects live in namespaces.
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
        """The version in the group."""
        return self.api_version.rpartition("/")[2]

    def __str__(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural


MOEMODEL = Kind("faasmoe.dev/v1alpha1", "MoEModel", "moemodels")
POD = Kind("v1", "Pod", "pods")
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
)
OPTIONAL_KINDS = (HTTP_ROUTE, SERVICE_MONITOR)
"""Kinds of APIs that a cluster may not serve."""
WATCHED_KINDS = (
    MOEMODEL,
    POD,
    *(kind for kind in OWNED_KINDS if kind not in (SECRET, *OPTIONAL_KINDS)),
)
"""Kinds that the cache holds everywhere: secrets are created, never read."""

_KINDS_BY_GVK = {
    (kind.api_version, kind.name): kind for kind in (MOEMODEL, POD, EVENT, LEASE, *OWNED_KINDS)
}


def kind_of(obj: Mapping[str, Any]) -> Kind:
    """Return the kind of an object; raises KeyError for one that the operator does not know."""
    return _KINDS_BY_GVK[obj["apiVersion"], obj["kind"]]


class ModelKey(NamedTuple):
    """Namespace and name of a MoEModel."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"
