"""Kubernetes platform: sandboxes as bare pods of one MoEModel, created from one template.

Knows nothing of functions. Pods come from the object cache. Readiness is probed at the sandbox
itself, since the kubelet reports it a probe period and a watch event later.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

from faasmoe_contracts.backoff import Backoff
from faasmoe_contracts.tls import TlsPeer
from faasmoe_operator.aio import TaskSet
from faasmoe_operator.errors import PlatformError, PlatformStopping
from faasmoe_operator.kube.client import KubeApi
from faasmoe_operator.kube.errors import Conflict, KubeApiError, NamespaceTerminating
from faasmoe_operator.kube.manifests.names import COMPONENT_LABEL, TEMPLATE_LABEL, Component
from faasmoe_operator.kube.manifests.sandbox import SANDBOX_PORT
from faasmoe_operator.kube.sandbox_template import SandboxPodTemplate
from faasmoe_operator.kube.types import POD, Object
from faasmoe_operator.platforms.base import Sandbox, SandboxEvent
from faasmoe_operator.platforms.readiness import ReadinessProber
from faasmoe_operator.platforms.registry import SandboxRegistry

logger = logging.getLogger(__name__)

Pod = Mapping[str, Any]
_FINISHED_PHASES = ("Failed", "Succeeded", "Unknown")
MAX_NAME_ATTEMPTS = 3
AT_ONCE_GRACE_S = 1  # the least with which the kubelet still ends the containers itself


def pod_name(pod: Pod) -> str:
    """Return a pod's name."""
    return str(pod["metadata"]["name"])


def pod_uid(pod: Pod) -> str:
    """Return a pod's uid."""
    return str(pod["metadata"]["uid"])


def is_terminating(pod: Pod) -> bool:
    """Return whether a pod is being deleted."""
    return "deletionTimestamp" in pod["metadata"]


def is_finished(pod: Pod) -> bool:
    """Return whether a pod will never serve again."""
    return _pod_status(pod).get("phase") in _FINISHED_PHASES


def pod_address(pod: Pod, *, port: int) -> str:
    """Return `host:port` of a pod; empty until it has an address."""
    host = _pod_status(pod).get("podIP") or ""
    if not host:
        return ""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def termination_reason(pod: Pod) -> str:
    """Return in words why a pod has finished."""
    status = _pod_status(pod)
    if status.get("phase") == "Unknown":
        return "its node is unreachable"
    if message := status.get("message") or status.get("reason"):
        reason = status.get("reason") or ""
        return message if message.startswith(reason) else f"{reason}: {message}"
    terminated = [
        container["state"]["terminated"]
        for container in status.get("containerStatuses", ())
        if (container.get("state") or {}).get("terminated")
    ]
    return (
        _describe_termination(terminated[0])
        if terminated
        else f"its pod is {status.get('phase', 'gone')}"
    )


def _describe_termination(terminated: Mapping[str, Any]) -> str:
    reason, code = terminated.get("reason") or "", terminated.get("exitCode")
    lines = str(terminated.get("message") or "").strip().splitlines()
    description = f"it ended with status {code}" + (
        f" ({reason})" if reason not in ("", "Error") else ""
    )
    return f"{description}: {lines[-1][:300]}" if lines else description


def _pod_status(pod: Pod) -> Mapping[str, Any]:
    status: Mapping[str, Any] = pod.get("status") or {}
    return status


class PodLister(Protocol):
    """The pods of one MoEModel; `kube.cache.OwnedPods` implements it."""

    def list_oldest_first(self) -> Sequence[Object]:
        """Return the pods, oldest first."""
        ...

    def update(self, pod: Object) -> None:
        """Store the response to a write, which can arrive before the watch event."""
        ...

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds; it is evaluated at each change of these pods."""
        ...


@dataclass(frozen=True, slots=True)
class PodPlatformTiming:
    """Periods and timeouts, in seconds.

    Attributes:
        probe_interval_s: interval between readiness probes of a starting sandbox.
        probe_timeout_s: timeout of one probe.
        grace_s: termination grace period of a deleted pod.
        retry_delays_s: delays between attempts to delete a pod; the last one repeats.
    """

    probe_interval_s: float = 0.15
    probe_timeout_s: float = 0.3
    grace_s: int = 10
    retry_delays_s: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0, 30.0)


class KubernetesPlatform:
    """Runs sandboxes as pods. Use as an async context manager, with `run` in a task.

    Args:
        api: the Kubernetes API.
        pods: the model's pods.
        timing: periods and timeouts.
        port: port on which sandboxes listen.
        tls: how sandboxes are known; None probes them without TLS.
    """

    def __init__(
        self,
        api: KubeApi,
        pods: PodLister,
        *,
        timing: PodPlatformTiming | None = None,
        port: int = SANDBOX_PORT,
        tls: TlsPeer | None = None,
    ) -> None:
        self.last_start_failure = ""
        """Why a sandbox was lost before it was ready; empty once another one became ready."""
        self._api = api
        self._pods = pods
        self._timing = timing or PodPlatformTiming()
        self._port = port
        self._registry = SandboxRegistry()
        self._deleting: dict[str, str] = {}
        self._was_ready: set[str] = set()  # ids of sandboxes that have been ready once
        self._prober = ReadinessProber(
            interval_s=self._timing.probe_interval_s,
            timeout_s=self._timing.probe_timeout_s,
            on_ready=self._mark_ready,
            tls=tls,
        )
        self._deletions = TaskSet()

    async def __aenter__(self) -> Self:
        """Register the existing pods."""
        self._prober.open()
        self._sync_pods()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop probes and deletions; the pods keep running."""
        await self._prober.close()
        await self._deletions.cancel_all()

    async def run(self) -> None:
        """Follow changes of the pods until cancelled."""
        while True:
            seen = self._resource_versions()
            self._sync_pods()
            await self._pods.wait_for(lambda seen=seen: self._resource_versions() != seen)  # type: ignore[misc]

    async def create(self, template: SandboxPodTemplate) -> Sandbox:
        """Create a pod, which counts from now on and becomes ready later; raises PlatformError."""
        pod = await self._create(template)
        self._pods.update(pod)
        self._sync_pods()
        sandbox = self._registry.get(pod_name(pod))
        return sandbox or self._make_sandbox(pod, ready=False)

    async def delete(self, sandbox_id: str, *, at_once: bool = False, failed: bool = False) -> None:
        """Start to delete a pod, with retries; it counts as terminating from now on."""
        grace_s = AT_ONCE_GRACE_S if at_once else self._timing.grace_s
        for pod in self._sandbox_pods():
            if pod_name(pod) == sandbox_id:
                self._start_deletion(pod, grace_s=grace_s)
                self._track_pod(pod)

    async def list(self) -> tuple[Sandbox, ...]:
        """Return every sandbox whose pod has not finished, oldest first."""
        return self._registry.all()

    def watch(self) -> AsyncIterator[SandboxEvent]:
        """Yield every existing sandbox, then changes, forever."""
        return self._registry.watch()

    async def _create(self, template: SandboxPodTemplate) -> Object:
        for _ in range(MAX_NAME_ATTEMPTS):
            try:
                return await self._api.create(POD, template.new_pod())
            except Conflict as error:
                logger.info("sandbox pod name already exists: %s", error)
            except NamespaceTerminating as error:
                raise PlatformStopping(f"the namespace is being deleted: {error}") from error
            except KubeApiError as error:
                raise PlatformError(f"sandbox pod could not be created: {error}") from error
        raise PlatformError(
            f"sandbox pod could not be created: {MAX_NAME_ATTEMPTS} names already existed"
        )

    def _resource_versions(self) -> dict[str, str]:
        pods = self._sandbox_pods()
        return {pod_uid(pod): str(pod["metadata"]["resourceVersion"]) for pod in pods}

    def _sandbox_pods(self) -> Sequence[Object]:
        return [
            pod
            for pod in self._pods.list_oldest_first()
            if pod["metadata"].get("labels", {}).get(COMPONENT_LABEL) == Component.SANDBOX
        ]

    def _sync_pods(self) -> None:
        """Bring the registry to the state of the cached pods."""
        pods = {pod_name(pod): pod for pod in self._sandbox_pods()}
        for sandbox in self._registry.all():
            if sandbox.id not in pods:
                self._mark_lost(sandbox.id, "its pod was deleted")
        for pod in pods.values():
            if is_finished(pod):
                self._mark_lost(pod_name(pod), termination_reason(pod))
                self._start_deletion(pod, grace_s=self._timing.grace_s)
            else:
                self._track_pod(pod)
        uids = set(map(pod_uid, pods.values()))
        self._deleting = {uid: name for uid, name in self._deleting.items() if uid in uids}

    def _track_pod(self, pod: Pod) -> None:
        """Register or update a sandbox, and probe it while it starts."""
        name, is_deleting = pod_name(pod), is_terminating(pod) or pod_uid(pod) in self._deleting
        known, observed = self._registry.get(name), self._make_sandbox(pod, ready=False)
        if known is None and is_deleting:
            return  # terminated by an earlier controller: never registered here, so not lost
        is_ready = (
            known is not None
            and known.ready
            and known.address == observed.address
            and not is_deleting
        )
        if is_ready:
            return
        if known != observed:
            self._prober.stop(name)
            self._registry.upsert(observed)
        if is_deleting or not observed.address:
            self._prober.stop(name)
        else:
            self._prober.start(name, observed.address)

    def _make_sandbox(self, pod: Pod, *, ready: bool) -> Sandbox:
        template_hash = pod["metadata"]["labels"].get(TEMPLATE_LABEL, "")
        return Sandbox(
            pod_name(pod),
            pod_address(pod, port=self._port),
            ready,
            template_hash,
            node=pod["spec"].get("nodeName", ""),
            terminating=is_terminating(pod),
        )

    def _mark_lost(self, name: str, reason: str) -> None:
        self._prober.stop(name)
        sandbox = self._registry.get(name)
        if sandbox is None:
            return
        logger.info("sandbox %s is gone: %s", name, reason)
        if name not in self._was_ready and name not in self._deleting.values():
            self.last_start_failure = f"sandbox {name} was lost before it was ready: {reason}"
        self._was_ready.discard(name)
        self._registry.remove(name, reason=reason)

    def _start_deletion(self, pod: Pod, *, grace_s: int) -> None:
        """Delete a pod in the background, unless it is terminating already."""
        if not is_terminating(pod) and pod_uid(pod) not in self._deleting:
            self._deleting[pod_uid(pod)] = pod_name(pod)
            self._deletions.start(self._delete_with_retries(pod, grace_s=grace_s))

    async def _delete_with_retries(self, pod: Pod, *, grace_s: int) -> None:
        """Delete a pod, retrying until the API server accepts it or the pod is gone."""
        namespace, uid = pod["metadata"]["namespace"], pod_uid(pod)
        backoff = Backoff(self._timing.retry_delays_s)
        while uid in self._deleting:
            try:
                await self._api.delete(POD, namespace, pod_name(pod), uid=uid, grace_s=grace_s)
            except KubeApiError as error:
                logger.warning("sandbox %s could not be deleted: %s", pod_name(pod), error)
            else:
                return
            await asyncio.sleep(backoff.next_delay_s())

    def _mark_ready(self, name: str) -> None:
        """Handle that a sandbox answered its readiness probe."""
        self.last_start_failure = ""
        self._was_ready.add(name)
        if (sandbox := self._registry.get(name)) is not None:
            self._registry.upsert(replace(sandbox, ready=True))
