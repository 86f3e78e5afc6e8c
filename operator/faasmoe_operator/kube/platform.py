"""What a sandbox's pod is like, as far as the control core is concerned. Pure.

The Kubernetes platform: sandboxes are bare pods of one MoEModel, made from one template.

Knows nothing of functions. Which pods there are is what the API server has told; whether one is
ready is asked of itself, as the kubelet's word comes a probe period and a watch event later.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

from faasmoe_operator.aio import TaskSet
from faasmoe_operator.errors import PlatformError
from faasmoe_operator.kube.client import KubeApi
from faasmoe_operator.kube.errors import Conflict, KubeApiError
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
    """Return in words why a pod is over."""
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


MAX_NAME_ATTEMPTS = 3


class PodLister(Protocol):
    """The pods of one MoEModel; `kube.cache.PodSource` is such."""

    def list_oldest_first(self) -> Sequence[Object]:
        """Return the pods, oldest first."""
        ...

    def update(self, pod: Object) -> None:
        """Take the API's answer to a write, which the watch may tell only later."""
        ...

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds; it is looked at at each change of these pods."""
        ...


@dataclass(frozen=True, slots=True)
class PodPlatformTiming:
    """How often, and how long.

    Attributes:
        probe_interval_s: between two readiness probes of a sandbox that is starting.
        probe_timeout_s: for the answer to one probe.
        grace_s: for a deleted sandbox to finish.
        retry_delays_s: before a deletion that was refused is tried again; the last one for good.
    """

    probe_interval_s: float = 0.15
    probe_timeout_s: float = 0.3
    grace_s: int = 10
    retry_delays_s: tuple[float, ...] = (1.0, 2.0, 5.0, 10.0, 30.0)


class KubernetesPlatform:
    """Runs sandboxes as pods; use as an async context manager, and `run` beside the control core.

    Args:
        api: the Kubernetes API.
        pods: the model's pods.
        timing: how often, and how long.
        port: where sandboxes listen.
    """

    def __init__(
        self,
        api: KubeApi,
        pods: PodLister,
        *,
        timing: PodPlatformTiming | None = None,
        port: int = SANDBOX_PORT,
    ) -> None:
        self.last_start_failure = ""
        """Why the last sandbox was lost that never was ready; empty once one was."""
        self._api = api
        self._pods = pods
        self._timing = timing or PodPlatformTiming()
        self._port = port
        self._registry = SandboxRegistry()
        self._deleting: dict[str, str] = {}
        self._prober = ReadinessProber(
            interval_s=self._timing.probe_interval_s,
            timeout_s=self._timing.probe_timeout_s,
            on_ready=self._mark_ready,
        )
        self._deletions = TaskSet()

    async def __aenter__(self) -> Self:
        """Read back the pods that there are."""
        self._prober.open()
        self._sync_pods()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop looking; the pods go on."""
        await self._prober.close()
        await self._deletions.cancel_all()

    async def run(self) -> None:
        """Follow the pods until cancelled."""
        while True:
            seen = self._resource_versions()
            self._sync_pods()
            await self._pods.wait_for(lambda seen=seen: self._resource_versions() != seen)  # type: ignore[misc]

    async def create(self, template: SandboxPodTemplate) -> Sandbox:
        """Create a pod; it is there at once and gets ready later. Raises PlatformError."""
        pod = await self._create(template)
        self._pods.update(pod)
        self._sync_pods()
        sandbox = self._registry.get(pod_name(pod))
        return sandbox or self._make_sandbox(pod, ready=False)

    async def delete(self, sandbox_id: str) -> None:
        """Begin to delete a pod; it counts as going at once, whatever the API server answers."""
        for pod in self._sandbox_pods():
            if pod_name(pod) == sandbox_id:
                self._start_deletion(pod)
                self._track_pod(pod)

    async def list(self) -> tuple[Sandbox, ...]:
        """Return every sandbox whose pod is there and not over, oldest first."""
        return self._registry.all()

    def watch(self) -> AsyncIterator[SandboxEvent]:
        """Give every sandbox that is there, then what changes, without end."""
        return self._registry.watch()

    async def _create(self, template: SandboxPodTemplate) -> Object:
        for _ in range(MAX_NAME_ATTEMPTS):
            try:
                return await self._api.create(POD, template.new_pod())
            except Conflict as error:
                logger.info("sandbox pod name already exists: %s", error)
            except KubeApiError as error:
                raise PlatformError(f"a sandbox's pod could not be created: {error}") from error
        raise PlatformError(
            f"a sandbox's pod could not be created: {MAX_NAME_ATTEMPTS} names already existed"
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
        """Take what the API server has told."""
        pods = {pod_name(pod): pod for pod in self._sandbox_pods()}
        for sandbox in self._registry.all():
            if sandbox.id not in pods:
                self._mark_lost(sandbox.id, "its pod was deleted")
        for pod in pods.values():
            if is_finished(pod):
                self._mark_lost(pod_name(pod), termination_reason(pod))
                self._start_deletion(pod)
            else:
                self._track_pod(pod)
        uids = set(map(pod_uid, pods.values()))
        self._deleting = {uid: name for uid, name in self._deleting.items() if uid in uids}

    def _track_pod(self, pod: Pod) -> None:
        """Add a sandbox or bring it up to date, and probe it while it starts."""
        name, is_deleting = pod_name(pod), is_terminating(pod) or pod_uid(pod) in self._deleting
        known, observed = self._registry.get(name), self._make_sandbox(pod, ready=False)
        if known is None and is_deleting:
            return  # an earlier control has ended it: it was never ours to lose
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
        return Sandbox(pod_name(pod), pod_address(pod, port=self._port), ready, template_hash)

    def _mark_lost(self, name: str, reason: str) -> None:
        self._prober.stop(name)
        sandbox = self._registry.get(name)
        if sandbox is None:
            return
        logger.info("sandbox %s is gone: %s", name, reason)
        if not sandbox.ready and name not in self._deleting.values():
            self.last_start_failure = f"sandbox {name} was lost before it was ready: {reason}"
        self._registry.remove(name, reason=reason)

    def _start_deletion(self, pod: Pod) -> None:
        """Have a pod deleted, unless that is under way."""
        if not is_terminating(pod) and pod_uid(pod) not in self._deleting:
            self._deleting[pod_uid(pod)] = pod_name(pod)
            self._deletions.start(self._delete_with_retries(pod))

    async def _delete_with_retries(self, pod: Pod) -> None:
        """Delete a pod, again and again until the API server takes it or the pod is gone."""
        namespace, uid = pod["metadata"]["namespace"], pod_uid(pod)
        delays_s = iter(self._timing.retry_delays_s)
        delay_s = 0.0
        while uid in self._deleting:
            try:
                await self._api.delete(
                    POD, namespace, pod_name(pod), uid=uid, grace_s=self._timing.grace_s
                )
            except KubeApiError as error:
                logger.warning("sandbox %s could not be deleted: %s", pod_name(pod), error)
            else:
                return
            delay_s = next(delays_s, delay_s)
            await asyncio.sleep(delay_s)

    def _mark_ready(self, name: str) -> None:
        """Take that a sandbox says that it is ready."""
        self.last_start_failure = ""
        if (sandbox := self._registry.get(name)) is not None:
            self._registry.upsert(replace(sandbox, ready=True))
