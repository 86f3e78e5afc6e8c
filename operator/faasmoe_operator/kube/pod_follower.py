"""Keeps something of a model's sandbox pods up to date with its controller, with a short delay."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

from faasmoe_contracts.backoff import Backoff
from faasmoe_operator.aio import gather_limited
from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.fleet import SandboxRecord
from faasmoe_operator.kube.cache import OwnedPods
from faasmoe_operator.kube.client import KubeApi
from faasmoe_operator.kube.errors import KubeApiError, NotFound
from faasmoe_operator.kube.types import Object
from faasmoe_operator.plan.fleet import SandboxState

logger = logging.getLogger(__name__)

COALESCE_S = 0.5
RETRY_DELAYS_S = (1.0, 5.0, 15.0, 60.0)
MAX_PARALLEL_PATCHES = 4

State = TypeVar("State")


class PodFollower(ABC, Generic[State]):
    """Writes one aspect of each pod whenever it is not as the controller says.

    Args:
        api: the Kubernetes API.
        pods: the model's pods.
        controller: knows which functions the sandboxes hold.
        namespace: namespace of the pods.
        coalesce_s: delay that merges changes into one patch, in seconds.

    Attributes:
        what: what it writes, in messages.
    """

    what: str

    def __init__(
        self,
        api: KubeApi,
        pods: OwnedPods,
        controller: Controller,
        *,
        namespace: str,
        coalesce_s: float = COALESCE_S,
    ) -> None:
        self._api = api
        self._pods = pods
        self._controller = controller
        self._namespace = namespace
        self._coalesce_s = coalesce_s

    async def run(self) -> None:
        """Patch changed pods until cancelled, retrying failures with increasing delays."""
        backoff = Backoff(RETRY_DELAYS_S)
        while True:
            revision = self._controller.revision
            if await self.update():
                backoff.reset()
                await self._controller.wait_for_change(revision)
            else:
                await asyncio.sleep(backoff.next_delay_s())
            await asyncio.sleep(self._coalesce_s)

    async def update(self) -> bool:
        """Patch every pod that is outdated; return whether all succeeded."""
        pending = self.pending_changes()
        results = await gather_limited(pending.items(), self._write, limit=MAX_PARALLEL_PATCHES)
        return all(results)

    def pending_changes(self) -> dict[str, State]:
        """Return the desired states, by pod name, of pods that are outdated."""
        desired = {
            record.sandbox.id: state
            for record in self._controller.fleet.sandboxes
            if record.state is SandboxState.READY and (state := self._desired(record)) is not None
        }
        pods = {name: self._pods.get(self._namespace, name) for name in desired}
        return {
            name: state
            for name, state in desired.items()
            if (pod := pods[name]) is not None and self._observed(pod) != state
        }

    async def _write(self, item: tuple[str, State]) -> bool:
        name, state = item
        try:
            pod = await self._patch(name, state)
        except NotFound:
            return True
        except KubeApiError as error:
            logger.warning("pod %s: %s not updated: %s", name, self.what, error)
            return self._gives_up(name, state, error)
        self._pods.update(pod)
        return True

    def _gives_up(self, name: str, state: State, error: KubeApiError) -> bool:
        """Return whether a state that could not be written is not tried again."""
        return False

    @abstractmethod
    def _desired(self, record: SandboxRecord) -> State | None:
        """Return what the pod of a ready sandbox should be like; None to leave it alone."""

    @abstractmethod
    def _observed(self, pod: Object) -> State:
        """Return what a pod is like."""

    @abstractmethod
    async def _patch(self, name: str, state: State) -> Object:
        """Write a pod's state and return the pod; raises KubeApiError."""
