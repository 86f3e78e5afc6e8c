"""Labels that show which functions a sandbox pod holds, for people who look at the cluster.

Nothing depends on these labels. They follow the controller with a short delay; changes in that
time are merged into one patch for each pod.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_operator.aio import gather_limited
from faasmoe_operator.api.v1alpha1.field_types import format_index_ranges
from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.fleet import SandboxRecord
from faasmoe_operator.kube.cache import OwnedPods
from faasmoe_operator.kube.client import KubeApi
from faasmoe_operator.kube.errors import KubeApiError, NotFound
from faasmoe_operator.kube.manifests.names import (
    FUNCTION_LABEL,
    FUNCTIONS_ANNOTATION,
    POOL_LABEL,
    Pool,
)
from faasmoe_operator.kube.pod_follower import COALESCE_S, MAX_PARALLEL_PATCHES, follow_controller
from faasmoe_operator.kube.types import POD, Object
from faasmoe_operator.plan.fleet import SandboxState

logger = logging.getLogger(__name__)

MAX_ANNOTATION_CHARS = 32 << 10


@dataclass(frozen=True, slots=True)
class PodFunctionLabels:
    """Labels and annotation that describe a pod's functions.

    Attributes:
        pool: warm or assigned.
        function: id of the function if the pod holds exactly one; None otherwise.
        functions: all functions as JSON; None if the pod holds none.
    """

    pool: str
    function: str | None
    functions: str | None

    @classmethod
    def for_functions(cls, functions: Iterable[FunctionSpec]) -> PodFunctionLabels:
        """Return the labels of a sandbox with these functions."""
        ordered = sorted(functions, key=lambda spec: (spec.layers, spec.experts))
        if not ordered:
            return cls(Pool.WARM.value, None, None)
        single_function = ordered[0].id if len(ordered) == 1 and len(ordered[0].id) <= 63 else None
        return cls(Pool.ASSIGNED.value, single_function, _functions_json(ordered))

    @classmethod
    def from_pod(cls, pod: Object) -> PodFunctionLabels:
        """Return a pod's current labels."""
        labels: Mapping[str, str] = pod["metadata"].get("labels", {})
        annotations: Mapping[str, str] = pod["metadata"].get("annotations", {})
        return cls(
            labels.get(POOL_LABEL, ""),
            labels.get(FUNCTION_LABEL),
            annotations.get(FUNCTIONS_ANNOTATION),
        )


class PodLabeler:
    """Keeps the labels of a model's pods up to date with its controller.

    Args:
        api: the Kubernetes API.
        pods: the model's pods.
        controller: knows which functions the sandboxes hold.
        namespace: namespace of the pods.
        coalesce_s: delay that merges changes into one patch, in seconds.
    """

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
        await follow_controller(self._controller, self.update, coalesce_s=self._coalesce_s)

    async def update(self) -> bool:
        """Patch every pod whose labels are outdated; return whether all succeeded."""
        pending = self.pending_changes()
        results = await gather_limited(pending.items(), self._patch, limit=MAX_PARALLEL_PATCHES)
        return all(results)

    def pending_changes(self) -> dict[str, PodFunctionLabels]:
        """Return the desired labels, by pod name, of pods whose labels are outdated."""
        ready_members = [
            m for m in self._controller.fleet.sandboxes if m.state is SandboxState.READY
        ]
        desired = {member.sandbox.id: self._desired_labels(member) for member in ready_members}
        pods = {name: self._pods.get(self._namespace, name) for name in desired}
        return {
            name: labels
            for name, labels in desired.items()
            if (pod := pods[name]) is not None and PodFunctionLabels.from_pod(pod) != labels
        }

    def _desired_labels(self, member: SandboxRecord) -> PodFunctionLabels:
        specs = self._controller.model.functions
        return PodFunctionLabels.for_functions(
            specs[name].spec for name in member.attached if name in specs
        )

    async def _patch(self, item: tuple[str, PodFunctionLabels]) -> bool:
        name, desired = item
        try:
            pod = await self._api.patch_metadata(
                POD,
                self._namespace,
                name,
                labels={POOL_LABEL: desired.pool, FUNCTION_LABEL: desired.function},
                annotations={FUNCTIONS_ANNOTATION: desired.functions},
            )
        except NotFound:
            return True
        except KubeApiError as error:
            logger.warning("pod %s: labels not updated: %s", name, error)
            return False
        self._pods.update(pod)
        return True


def _functions_json(functions: Iterable[FunctionSpec]) -> str:
    """Return the functions as JSON, truncated to MAX_ANNOTATION_CHARS."""
    shown: list[dict[str, Any]] = []
    n_chars = 2
    for spec in functions:
        entry = {
            "id": spec.id,
            "layers": format_index_ranges(spec.layers),
            "experts": format_index_ranges(spec.experts),
        }
        n_chars += len(json.dumps(entry)) + 2
        if n_chars > MAX_ANNOTATION_CHARS:
            break
        shown.append(entry)
    return json.dumps(shown)
