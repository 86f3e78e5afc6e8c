"""A node without a kubelet: pods bound to it run as processes of this machine.

The control plane is real: its scheduler binds pods to this node, its controllers create pods of
Jobs and Deployments. This module does what a kubelet does, as far as FaaSMoE needs it: volumes
(claims are folders, Secrets and ConfigMaps files), environment, probes, exit status, termination
message and grace period. Every pod gets an address in 127.0.0.0/8.
"""

from __future__ import annotations

import ipaddress
import itertools
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import httpx
from apiserver import ApiRequestError, ApiServer, Object
from container_factory import ContainerConfigError, ContainerFactory
from containers import Container
from node_registration import NodeRegistration, condition, now

HOSTNAME = "fake-node"
STORAGE_CLASS = "fake-node"
FIRST_ADDRESS = ipaddress.ip_address("127.10.0.1")
PERIOD_S = 0.1
PROBE_TIMEOUT_S = 1.0
GONE = (404, 409)


@dataclass(slots=True)
class _RunningPod:
    pod: Object
    address: str
    container: Container
    restarts: int = 0
    terminating_since_s: float | None = None
    reported_status: Object = field(default_factory=dict)


class FakeNode:
    """Runs the pods that are bound to it until its context ends.

    Args:
        api: administrator client that only the node's thread uses.
        folder: parent of the folders of claims, overlays and logs.
        entry_points: module that an image runs, by a part of the image's name.

    Attributes:
        errors: failures of the node itself.
    """

    def __init__(self, api: ApiServer, folder: Path, *, entry_points: Mapping[str, str]) -> None:
        self.errors: list[str] = []
        self._api = api
        self._registration = NodeRegistration(api, HOSTNAME)
        self._container_factory = ContainerFactory(api, folder, entry_points=entry_points)
        self._pods: dict[str, _RunningPod] = {}
        self._exited: set[str] = set()
        self._volumes: set[str] = set()
        self._addresses = (str(FIRST_ADDRESS + n) for n in itertools.count())
        self._http = httpx.Client(timeout=PROBE_TIMEOUT_S, trust_env=False)

    @property
    def selector(self) -> dict[str, str]:
        """Node selector of pods that should run here."""
        return self._registration.selector

    def claim_folder(self, namespace: str, claim: str) -> Path:
        """Return the folder that backs a claim."""
        return self._container_factory.claim_folder(namespace, claim)

    def pod_log(self, pod: str) -> str:
        """Return the output of a running pod's container."""
        return self._find(pod).container.log_file.read_text(errors="replace")

    def pod_address(self, pod: str) -> str:
        """Return a running pod's address."""
        return self._find(pod).address

    def kill(self, pod: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to a running pod's processes."""
        self._find(pod).container.signal(number)

    @contextmanager
    def running(self) -> Iterator[FakeNode]:
        """Register the node and run its pods."""
        self._registration.register()
        stopped = threading.Event()
        thread = threading.Thread(target=self._run, args=(stopped,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            stopped.set()
            thread.join()
            for running in self._pods.values():
                running.container.stop(grace_s=1.0)
            self._http.close()
            for uid in self._volumes:
                self._api.delete("persistentvolumes", "", f"fake-node-{uid}")
            self._registration.unregister()

    def _find(self, pod: str) -> _RunningPod:
        return next(r for r in list(self._pods.values()) if r.pod["metadata"]["name"] == pod)

    def _run(self, stopped: threading.Event) -> None:
        while not stopped.wait(PERIOD_S):
            try:
                self._registration.send_heartbeat()
                self._provision_volumes()
                self._sync_pods()
            except Exception as error:  # the fixture asserts that there were none
                self.errors.append(f"{type(error).__name__}: {error}")

    def _provision_volumes(self) -> None:
        """Bind the claims of the node's storage class to folders."""
        for claim in self._api.list("persistentvolumeclaims"):
            meta, spec = claim["metadata"], claim["spec"]
            is_ours = spec.get("storageClassName") == STORAGE_CLASS
            if is_ours and not spec.get("volumeName") and meta["uid"] not in self._volumes:
                self._volumes.add(meta["uid"])
                self._api.create("persistentvolumes", self._volume_for(claim))

    def _volume_for(self, claim: Object) -> Object:
        meta, spec = claim["metadata"], claim["spec"]
        folder = self.claim_folder(meta["namespace"], meta["name"])
        reference = {"kind": "PersistentVolumeClaim", "apiVersion": "v1"}
        reference |= {key: meta[key] for key in ("namespace", "name", "uid")}
        return {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": f"fake-node-{meta['uid']}"},
            "spec": {
                "capacity": spec["resources"]["requests"],
                "accessModes": spec["accessModes"],
                "claimRef": reference,
                "storageClassName": STORAGE_CLASS,
                "persistentVolumeReclaimPolicy": "Retain",
                "hostPath": {"path": str(folder)},
            },
        }

    def _sync_pods(self) -> None:
        pods = self._api.list("pods", fields=f"spec.nodeName={HOSTNAME}")
        for pod in pods:
            uid = pod["metadata"]["uid"]
            if "deletionTimestamp" in pod["metadata"]:
                self._terminate(pod)
            elif uid in self._pods:
                self._pods[uid].pod = pod
                self._sync_pod(self._pods[uid])
            elif uid not in self._exited:
                self._start(pod)
        for uid in set(self._pods) - {pod["metadata"]["uid"] for pod in pods}:
            self._pods.pop(uid).container.stop(grace_s=0.0)

    def _start(self, pod: Object) -> None:
        address = next(self._addresses)
        try:
            container = self._container_factory.create(pod, address)
        except ContainerConfigError as error:
            waiting = {"waiting": {"reason": "CreateContainerConfigError", "message": str(error)}}
            self._patch_status(
                pod, {"phase": "Pending", "containerStatuses": [_status(pod, waiting)]}
            )
            return
        container.start()
        self._pods[pod["metadata"]["uid"]] = _RunningPod(pod, address, container)

    def _terminate(self, pod: Object) -> None:
        """Let a pod terminate, and kill it when its grace period (deletionTimestamp) is over."""
        meta = pod["metadata"]
        running = self._pods.get(meta["uid"])
        if running is not None:
            if not self._is_pre_stop_done(running):
                return
            running.container.signal(signal.SIGTERM)
            over = datetime.fromisoformat(meta["deletionTimestamp"])
            if running.container.exit_status is None and datetime.now(UTC) < over:
                return
            del self._pods[meta["uid"]]
            running.container.stop(grace_s=0.0)
        self._api.delete("pods", meta["namespace"], meta["name"], gracePeriodSeconds=0)

    def _is_pre_stop_done(self, running: _RunningPod) -> bool:
        """Return whether the container's preStop sleep is over."""
        if running.terminating_since_s is None:
            running.terminating_since_s = time.monotonic()
        lifecycle = running.pod["spec"]["containers"][0].get("lifecycle", {})
        sleep_s: float = lifecycle.get("preStop", {}).get("sleep", {}).get("seconds", 0)
        return time.monotonic() - running.terminating_since_s >= sleep_s

    def _sync_pod(self, running: _RunningPod) -> None:
        exit_status = running.container.exit_status
        if exit_status is None:
            self._report_running(running)
        elif running.pod["spec"].get("restartPolicy", "Always") == "Always":
            running.restarts += 1
            running.container.start()
        else:
            self._report_exit(running, exit_status)

    def _report_exit(self, running: _RunningPod, exit_status: int) -> None:
        ended = {
            "exitCode": exit_status if exit_status >= 0 else 128 - exit_status,
            "reason": "Completed" if exit_status == 0 else "Error",
            "message": running.container.termination_message(),
            "startedAt": now(),
            "finishedAt": now(),
        }
        phase = "Succeeded" if exit_status == 0 else "Failed"
        status = _status(running.pod, {"terminated": ended})
        self._patch_status(running.pod, {"phase": phase, "containerStatuses": [status]})
        uid = running.pod["metadata"]["uid"]
        self._exited.add(uid)
        del self._pods[uid]

    def _report_running(self, running: _RunningPod) -> None:
        is_ready = self._is_ready(running)
        state = {"running": {"startedAt": running.pod["metadata"]["creationTimestamp"]}}
        status = _status(running.pod, state) | {
            "ready": is_ready,
            "started": is_ready,
            "restartCount": running.restarts,
            # As a kubelet that can resize pods says, and has applied at once.
            "resources": running.pod["spec"]["containers"][0].get("resources", {}),
        }
        reported = {"address": running.address, "status": status}
        if reported == running.reported_status:
            return
        conditions = [
            condition(kind, is_true=is_ready or kind in ("Initialized", "PodScheduled"))
            for kind in ("Initialized", "ContainersReady", "Ready", "PodScheduled")
        ]
        address = {"podIP": running.address, "podIPs": [{"ip": running.address}]}
        seen = {"phase": "Running", "conditions": conditions, "containerStatuses": [status]}
        self._patch_status(running.pod, seen | address)
        running.reported_status = reported

    def _is_ready(self, running: _RunningPod) -> bool:
        container = running.pod["spec"]["containers"][0]
        probe = container.get("readinessProbe", {})
        target = probe.get("httpGet") or probe.get("tcpSocket")
        if target is None:
            return True
        port = target["port"]
        if isinstance(port, str):
            port = next(p["containerPort"] for p in container["ports"] if p["name"] == port)
        try:
            if "path" not in target:
                socket.create_connection((running.address, port), timeout=2).close()
                return True
            answer = self._http.get(f"http://{running.address}:{port}{target['path']}")
        except (OSError, httpx.HTTPError):
            return False
        return answer.is_success

    def _patch_status(self, pod: Object, status: Object) -> None:
        meta = pod["metadata"]
        try:
            change = {"status": status}
            self._api.patch("pods", meta["namespace"], meta["name"], change, subresource="status")
        except ApiRequestError as error:
            if error.status not in GONE:
                raise


def _status(pod: Object, state: Object) -> Object:
    container = pod["spec"]["containers"][0]
    return {
        "name": container["name"],
        "image": container["image"],
        "imageID": "",
        "ready": False,
        "restartCount": 0,
        "state": state,
    }
