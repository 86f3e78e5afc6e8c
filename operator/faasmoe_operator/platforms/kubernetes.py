"""The Kubernetes platform: sandboxes are bare pods of one MoEModel, made from one template.

Knows nothing of functions. Which pods there are is what the API server has told; whether one is
ready is asked of itself, as the kubelet's word comes a probe period and a watch event later.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

from faasmoe_operator.control.tasks import Tasks
from faasmoe_operator.errors import PlatformError
from faasmoe_operator.kube.api import KubeApi
from faasmoe_operator.kube.errors import ApiError, Conflict
from faasmoe_operator.kube.kinds import POD, Object
from faasmoe_operator.kube.manifests.names import COMPONENT_LABEL, TEMPLATE_LABEL, Component
from faasmoe_operator.kube.manifests.sandbox import PORT
from faasmoe_operator.kube.sandbox_pods import SandboxPods
from faasmoe_operator.platforms.base import Sandbox, SandboxEvent
from faasmoe_operator.platforms.pod_state import (
    Pod,
    address_of,
    end_of,
    is_going,
    is_over,
    name_of,
    uid_of,
)
from faasmoe_operator.platforms.probes import Probes
from faasmoe_operator.platforms.roster import Roster

logger = logging.getLogger(__name__)

NAME_TRIES = 3


class Pods(Protocol):
    """The pods of one MoEModel; `kube.cache.PodSource` is such."""

    def pods(self) -> Sequence[Object]:
        """Return the pods, oldest first."""
        ...

    def put(self, pod: Object) -> None:
        """Take the API's answer to a write, which the watch may tell only later."""
        ...

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds; it is looked at at each change of these pods."""
        ...


@dataclass(frozen=True, slots=True)
class Timing:
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
        self, api: KubeApi, pods: Pods, *, timing: Timing | None = None, port: int = PORT
    ) -> None:
        self.loss = ""
        """Why the last sandbox was lost that never was ready; empty once one was."""
        self._api = api
        self._pods = pods
        self._timing = timing or Timing()
        self._port = port
        self._roster = Roster()
        self._ending: dict[str, str] = {}
        self._probes = Probes(
            interval_s=self._timing.probe_interval_s,
            timeout_s=self._timing.probe_timeout_s,
            ready=self._is_ready,
        )
        self._tasks = Tasks()

    async def __aenter__(self) -> Self:
        """Read back the pods that there are."""
        self._probes.open()
        self._refresh()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop looking; the pods go on."""
        await self._probes.close()
        await self._tasks.end()

    async def run(self) -> None:
        """Follow the pods until cancelled."""
        while True:
            seen = self._versions()
            self._refresh()
            await self._pods.wait_for(lambda seen=seen: self._versions() != seen)  # type: ignore[misc]

    async def create(self, template: SandboxPods) -> Sandbox:
        """Create a pod; it is there at once and gets ready later. Raises PlatformError."""
        pod = await self._create(template)
        self._pods.put(pod)
        self._refresh()
        sandbox = self._roster.get(name_of(pod))
        return sandbox or self._sandbox(pod, ready=False)

    async def delete(self, sandbox_id: str) -> None:
        """Begin to delete a pod; it counts as going at once, whatever the API server answers."""
        for pod in self._sandbox_pods():
            if name_of(pod) == sandbox_id:
                self._end(pod)
                self._take(pod)

    async def list(self) -> tuple[Sandbox, ...]:
        """Return every sandbox whose pod is there and not over, oldest first."""
        return self._roster.all()

    def watch(self) -> AsyncIterator[SandboxEvent]:
        """Give every sandbox that is there, then what changes, without end."""
        return self._roster.watch()

    async def _create(self, template: SandboxPods) -> Object:
        for _ in range(NAME_TRIES):
            try:
                return await self._api.create(POD, template.pod())
            except Conflict as error:
                logger.info("a sandbox's name was taken: %s", error)
            except ApiError as error:
                raise PlatformError(f"a sandbox's pod could not be created: {error}") from error
        raise PlatformError(f"a sandbox's pod could not be created: {NAME_TRIES} names were taken")

    def _versions(self) -> dict[str, str]:
        pods = self._sandbox_pods()
        return {uid_of(pod): str(pod["metadata"]["resourceVersion"]) for pod in pods}

    def _sandbox_pods(self) -> Sequence[Object]:
        return [
            pod
            for pod in self._pods.pods()
            if pod["metadata"].get("labels", {}).get(COMPONENT_LABEL) == Component.SANDBOX
        ]

    def _refresh(self) -> None:
        """Take what the API server has told."""
        pods = {name_of(pod): pod for pod in self._sandbox_pods()}
        for sandbox in self._roster.all():
            if sandbox.id not in pods:
                self._lose(sandbox.id, "its pod was deleted")
        for pod in pods.values():
            if is_over(pod):
                self._lose(name_of(pod), end_of(pod))
                self._end(pod)
            else:
                self._take(pod)
        uids = set(map(uid_of, pods.values()))
        self._ending = {uid: name for uid, name in self._ending.items() if uid in uids}

    def _take(self, pod: Pod) -> None:
        """Add a sandbox or bring it up to date, and probe it while it starts."""
        name, going = name_of(pod), is_going(pod) or uid_of(pod) in self._ending
        known, now = self._roster.get(name), self._sandbox(pod, ready=False)
        if known is None and going:
            return  # an earlier control has ended it: it was never ours to lose
        is_ready = known is not None and known.ready and known.address == now.address and not going
        if is_ready:
            return
        if known != now:
            self._probes.stop(name)
            self._roster.put(now)
        if going or not now.address:
            self._probes.stop(name)
        else:
            self._probes.begin(name, now.address)

    def _sandbox(self, pod: Pod, *, ready: bool) -> Sandbox:
        template_hash = pod["metadata"]["labels"].get(TEMPLATE_LABEL, "")
        return Sandbox(name_of(pod), address_of(pod, port=self._port), ready, template_hash)

    def _lose(self, name: str, reason: str) -> None:
        self._probes.stop(name)
        sandbox = self._roster.get(name)
        if sandbox is None:
            return
        logger.info("sandbox %s is gone: %s", name, reason)
        if not sandbox.ready and name not in self._ending.values():
            self.loss = f"sandbox {name} was lost before it was ready: {reason}"
        self._roster.remove(name, reason=reason)

    def _end(self, pod: Pod) -> None:
        """Have a pod deleted, unless that is under way."""
        if not is_going(pod) and uid_of(pod) not in self._ending:
            self._ending[uid_of(pod)] = name_of(pod)
            self._tasks.begin(self._delete(pod))

    async def _delete(self, pod: Pod) -> None:
        """Delete a pod, again and again until the API server takes it or the pod is gone."""
        namespace, uid = pod["metadata"]["namespace"], uid_of(pod)
        delays_s = iter(self._timing.retry_delays_s)
        delay_s = 0.0
        while uid in self._ending:
            try:
                await self._api.delete(
                    POD, namespace, name_of(pod), uid=uid, grace_s=self._timing.grace_s
                )
            except ApiError as error:
                logger.warning("sandbox %s could not be deleted: %s", name_of(pod), error)
            else:
                return
            delay_s = next(delays_s, delay_s)
            await asyncio.sleep(delay_s)

    def _is_ready(self, name: str) -> None:
        """Take that a sandbox says that it is ready."""
        self.loss = ""
        if (sandbox := self._roster.get(name)) is not None:
            self._roster.put(replace(sandbox, ready=True))
