"""Resizes sandbox pods in place, so that their requests follow what is attached to them.

The scheduler and the bill see what is used, and an idle model hardly counts. Only requests change,
never limits: a function is attached without waiting for it, also where a node has no room for the
larger request and the kubelet defers it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from faasmoe_operator.aio import gather_limited
from faasmoe_operator.api.v1alpha1.field_types import parse_quantity
from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.fleet import SandboxRecord
from faasmoe_operator.kube.cache import OwnedPods
from faasmoe_operator.kube.client import KubeApi
from faasmoe_operator.kube.errors import KubeApiError, NotFound
from faasmoe_operator.kube.manifests.resources import request_quantities
from faasmoe_operator.kube.manifests.sandbox import SANDBOX_CONTAINER
from faasmoe_operator.kube.pod_follower import COALESCE_S, MAX_PARALLEL_PATCHES, follow_controller
from faasmoe_operator.kube.types import Object
from faasmoe_operator.plan.fleet import SandboxState
from faasmoe_operator.plan.pod_requests import PodRequests, ResizePolicy

logger = logging.getLogger(__name__)


class PodResizer:
    """Keeps the requests of a model's sandbox pods up to date with its controller.

    Args:
        api: the Kubernetes API.
        pods: the model's pods.
        controller: knows which functions the sandboxes hold.
        policy: what sandboxes request.
        namespace: namespace of the pods.
        coalesce_s: delay that merges changes into one patch, in seconds.
    """

    def __init__(
        self,
        api: KubeApi,
        pods: OwnedPods,
        controller: Controller,
        policy: ResizePolicy,
        *,
        namespace: str,
        coalesce_s: float = COALESCE_S,
    ) -> None:
        self._api = api
        self._pods = pods
        self._controller = controller
        self._policy = policy
        self._namespace = namespace
        self._coalesce_s = coalesce_s

    async def run(self) -> None:
        """Resize pods until cancelled, retrying failures with increasing delays."""
        await follow_controller(self._controller, self.update, coalesce_s=self._coalesce_s)

    async def update(self) -> bool:
        """Resize every pod whose requests are outdated; return whether all succeeded."""
        pending = self.pending_changes()
        results = await gather_limited(pending.items(), self._resize, limit=MAX_PARALLEL_PATCHES)
        return all(results)

    def pending_changes(self) -> dict[str, PodRequests]:
        """Return the desired requests, by pod name, of pods whose requests are outdated.

        Pods of an earlier template are left alone: they may not be made to be resized.
        """
        template = self._controller.model.template.digest
        desired = {
            record.sandbox.id: self._desired_requests(record)
            for record in self._controller.fleet.sandboxes
            if record.state is SandboxState.READY and record.sandbox.template_hash == template
        }
        pods = {name: self._pods.get(self._namespace, name) for name in desired}
        return {
            name: requests
            for name, requests in desired.items()
            if (pod := pods[name]) is not None and pod_requests(pod) != requests
        }

    def _desired_requests(self, record: SandboxRecord) -> PodRequests:
        functions = self._controller.model.functions
        sizes = (functions[name].size_bytes for name in record.functions if name in functions)
        return self._policy.requests(sizes)

    async def _resize(self, item: tuple[str, PodRequests]) -> bool:
        name, requests = item
        try:
            pod = await self._api.resize_pod(
                self._namespace,
                name,
                container=SANDBOX_CONTAINER,
                requests=request_quantities(requests),
            )
        except NotFound:
            return True
        except KubeApiError as error:
            logger.warning("pod %s: requests not changed: %s", name, error)
            return False
        self._pods.update(pod)
        return True


def pod_requests(pod: Object) -> PodRequests:
    """Return the requests of a sandbox pod."""
    containers: list[Mapping[str, Any]] = pod["spec"]["containers"]
    container = next(c for c in containers if c["name"] == SANDBOX_CONTAINER)
    requests = container.get("resources", {}).get("requests", {})
    cpu = parse_quantity(str(requests.get("cpu", "0")))
    memory = parse_quantity(str(requests.get("memory", "0")))
    return PodRequests(round(cpu * 1000), int(memory))
