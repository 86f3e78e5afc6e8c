"""Labels that show which functions a sandbox pod holds, for people who look at the cluster.

Nothing depends on these labels. They follow the controller with a short delay; changes in that
time are merged into one patch for each pod.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_operator.api.v1alpha1.field_types import format_index_ranges
from faasmoe_operator.control.fleet import SandboxRecord
from faasmoe_operator.kube.manifests.names import (
    FUNCTION_LABEL,
    FUNCTIONS_ANNOTATION,
    POOL_LABEL,
    Pool,
)
from faasmoe_operator.kube.pod_follower import PodFollower
from faasmoe_operator.kube.types import POD, Object

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


class PodLabeler(PodFollower[PodFunctionLabels]):
    """Keeps the labels of a model's pods up to date with its controller."""

    what = "labels"

    def _desired(self, record: SandboxRecord) -> PodFunctionLabels:
        specs = self._controller.model.functions
        return PodFunctionLabels.for_functions(
            specs[name].spec for name in record.attached if name in specs
        )

    def _observed(self, pod: Object) -> PodFunctionLabels:
        return PodFunctionLabels.from_pod(pod)

    async def _patch(self, name: str, state: PodFunctionLabels) -> Object:
        return await self._api.patch_metadata(
            POD,
            self._namespace,
            name,
            labels={POOL_LABEL: state.pool, FUNCTION_LABEL: state.function},
            annotations={FUNCTIONS_ANNOTATION: state.functions},
        )


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
