"""Registers a Node object and sends its heartbeats, without a kubelet."""

from __future__ import annotations

import time
from datetime import UTC, datetime

from apiserver import ApiServer, Object

HEARTBEAT_S = 5.0
LEASE_NAMESPACE = "kube-node-lease"


class NodeRegistration:
    """Keeps a node registered and ready, so that the scheduler binds pods to it.

    Args:
        api: administrator client.
        hostname: the node's name and value of the label kubernetes.io/hostname.
        n_pods: its capacity of pods.
    """

    def __init__(self, api: ApiServer, hostname: str, *, n_pods: int = 500) -> None:
        self._api = api
        self._hostname = hostname
        self._n_pods = n_pods
        self._next_heartbeat_s = 0.0

    @property
    def selector(self) -> dict[str, str]:
        """Node selector of pods that should run here."""
        return {"kubernetes.io/hostname": self._hostname}

    def register(self) -> None:
        """Register the node."""
        labels = {**self.selector, "kubernetes.io/os": "linux"}
        meta = {"name": self._hostname, "labels": labels}
        self._api.delete("nodes", "", self._hostname)
        self._api.apply("nodes", {"apiVersion": "v1", "kind": "Node", "metadata": meta})
        self.send_heartbeat()

    def send_heartbeat(self) -> None:
        """Send a heartbeat if one is due."""
        if time.monotonic() < self._next_heartbeat_s:
            return
        self._next_heartbeat_s = time.monotonic() + HEARTBEAT_S
        self._report_ready()
        self._renew_lease()

    def unregister(self) -> None:
        """Delete the node."""
        self._api.delete("nodes", "", self._hostname)

    def _report_ready(self) -> None:
        resources = {
            "cpu": "100k",
            "memory": "1Pi",
            "pods": str(self._n_pods),
            "ephemeral-storage": "1Pi",
        }
        ready = condition("Ready", is_true=True) | {
            "reason": "FakeKubelet",
            "message": "there is no kubelet",
            "lastHeartbeatTime": now(),
        }
        status = {"capacity": resources, "allocatable": resources, "conditions": [ready]}
        self._api.patch("nodes", "", self._hostname, {"status": status}, subresource="status")

    def _renew_lease(self) -> None:
        spec = {
            "holderIdentity": self._hostname,
            "leaseDurationSeconds": 40,
            "renewTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        }
        meta = {"name": self._hostname, "namespace": LEASE_NAMESPACE}
        lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": meta}
        self._api.apply("leases", {**lease, "spec": spec})


def condition(kind: str, *, is_true: bool) -> Object:
    """Return a condition whose transition time is now."""
    return {"type": kind, "status": str(is_true), "lastTransitionTime": now()}


def now() -> str:
    """Return the current time in RFC 3339 format."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
