"""Resizes sandbox pods in place, so that their requests follow what is attached to them.

The scheduler and the bill see what is used, and an idle model hardly counts. Only requests change,
never limits: a function is attached without waiting for it, also where a node has no room for the
larger request and the kubelet defers it. What a node can never give, or cannot resize, is asked for
once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from faasmoe_operator.api.v1alpha1.field_types import parse_quantity
from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.fleet import SandboxRecord
from faasmoe_operator.kube.cache import OwnedPods
from faasmoe_operator.kube.client import KubeApi
from faasmoe_operator.kube.errors import Invalid, KubeApiError, NodeTooSmall
from faasmoe_operator.kube.manifests.resources import request_quantities
from faasmoe_operator.kube.manifests.sandbox import SANDBOX_CONTAINER
from faasmoe_operator.kube.pod_follower import PodFollower
from faasmoe_operator.kube.types import Object
from faasmoe_operator.plan.pod_requests import PodRequests, ResizePolicy


class PodResizer(PodFollower[PodRequests]):
    """Keeps the requests of a model's sandbox pods up to date with its controller.

    Pods of an earlier template are left alone: they may not be made to be resized.

    Args:
        api: the Kubernetes API.
        pods: the model's pods.
        controller: knows which functions the sandboxes hold.
        policy: what sandboxes request.
        namespace: namespace of the pods.
    """

    what = "requests"

    def __init__(
        self,
        api: KubeApi,
        pods: OwnedPods,
        controller: Controller,
        policy: ResizePolicy,
        *,
        namespace: str,
    ) -> None:
        super().__init__(api, pods, controller, namespace=namespace)
        self._policy = policy
        self._refused: dict[str, PodRequests] = {}  # what a pod's node cannot do, by pod

    def _desired(self, record: SandboxRecord) -> PodRequests | None:
        if record.sandbox.template_hash != self._controller.model.template.digest:
            return None
        functions = self._controller.model.functions
        sizes = (functions[name].size_bytes for name in record.functions if name in functions)
        desired = self._policy.requests(sizes)
        return None if self._refused.get(record.sandbox.id) == desired else desired

    def _observed(self, pod: Object) -> PodRequests:
        return pod_requests(pod)

    def _gives_up(self, name: str, state: PodRequests, error: KubeApiError) -> bool:
        if not isinstance(error, NodeTooSmall | Invalid):
            return False
        pods = {record.sandbox.id for record in self._controller.fleet.sandboxes}
        self._refused = {pod: old for pod, old in self._refused.items() if pod in pods}
        self._refused[name] = state
        return True

    async def _patch(self, name: str, state: PodRequests) -> Object:
        return await self._api.resize_pod(
            self._namespace, name, container=SANDBOX_CONTAINER, requests=request_quantities(state)
        )


def pod_requests(pod: Object) -> PodRequests:
    """Return the requests of a sandbox pod."""
    containers: list[Mapping[str, Any]] = pod["spec"]["containers"]
    container = next(c for c in containers if c["name"] == SANDBOX_CONTAINER)
    requests = container.get("resources", {}).get("requests", {})
    cpu = parse_quantity(str(requests.get("cpu", "0")))
    memory = parse_quantity(str(requests.get("memory", "0")))
    return PodRequests(round(cpu * 1000), int(memory))
