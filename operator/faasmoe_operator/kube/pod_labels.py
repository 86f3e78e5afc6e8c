"""Sandboxes' pods say which functions they hold, for those who look at the cluster.

Nothing is decided by these labels: the truth is in the sandboxes, and the control core has it. They
follow it with a short delay, one patch for a pod however much changed meanwhile.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from faasmoe_expert.table import FunctionSpec
from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.fleet import Member
from faasmoe_operator.control.parallel import for_each
from faasmoe_operator.kube.api import KubeApi
from faasmoe_operator.kube.cache import PodSource
from faasmoe_operator.kube.errors import ApiError, NotFound
from faasmoe_operator.kube.kinds import POD, Object
from faasmoe_operator.kube.manifests.names import (
    FUNCTION_LABEL,
    FUNCTIONS_ANNOTATION,
    POOL_LABEL,
    Pool,
)
from faasmoe_operator.plan.fleet import SandboxState
from faasmoe_operator.spec.ranges import format_ranges

logger = logging.getLogger(__name__)

COALESCE_S = 0.5
RETRY_DELAYS_S = (1.0, 5.0, 15.0, 60.0)
PARALLEL_CALLS = 4
MAX_ANNOTATION_CHARS = 32 << 10


@dataclass(frozen=True, slots=True)
class PodMarks:
    """What a pod says of its functions.

    Attributes:
        pool: warm or assigned.
        function: the function's id, if it holds just one.
        functions: all of them, as JSON; None if it holds none.
    """

    pool: str
    function: str | None
    functions: str | None

    @classmethod
    def of(cls, functions: Iterable[FunctionSpec]) -> PodMarks:
        """Return what a sandbox with these functions is to say."""
        held = sorted(functions, key=lambda spec: (spec.layers, spec.experts))
        if not held:
            return cls(Pool.WARM.value, None, None)
        alone = held[0].id if len(held) == 1 and len(held[0].id) <= 63 else None
        return cls(Pool.ASSIGNED.value, alone, _as_json(held))

    @classmethod
    def on(cls, pod: Object) -> PodMarks:
        """Return what a pod says."""
        labels: Mapping[str, str] = pod["metadata"].get("labels", {})
        annotations: Mapping[str, str] = pod["metadata"].get("annotations", {})
        return cls(
            labels.get(POOL_LABEL, ""),
            labels.get(FUNCTION_LABEL),
            annotations.get(FUNCTIONS_ANNOTATION),
        )


class PodLabels:
    """Keeps a model's pods saying what its control core knows."""

    def __init__(
        self,
        api: KubeApi,
        pods: PodSource,
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
        """Patch what differs until cancelled; what is refused is tried again later and later."""
        n_failures = 0
        while True:
            revision = self._controller.revision
            is_done = await self.update()
            n_failures = 0 if is_done else n_failures + 1
            if is_done:
                await self._controller.beyond(revision)
            else:
                await asyncio.sleep(RETRY_DELAYS_S[min(n_failures, len(RETRY_DELAYS_S)) - 1])
            await asyncio.sleep(self._coalesce_s)

    async def update(self) -> bool:
        """Patch every pod that says something else; return whether all of them were taken."""
        wanted = self.differing()
        taken = await for_each(wanted.items(), self._patch, limit=PARALLEL_CALLS)
        return all(taken)

    def differing(self) -> dict[str, PodMarks]:
        """Return what pods are to say, by their names, that say something else."""
        serving = [m for m in self._controller.fleet.members if m.state is SandboxState.READY]
        wanted = {member.sandbox.id: self._marks(member) for member in serving}
        pods = {name: self._pods.get(self._namespace, name) for name in wanted}
        return {
            name: marks
            for name, marks in wanted.items()
            if (pod := pods[name]) is not None and PodMarks.on(pod) != marks
        }

    def _marks(self, member: Member) -> PodMarks:
        specs = self._controller.model.functions
        return PodMarks.of(specs[name].spec for name in member.attached if name in specs)

    async def _patch(self, item: tuple[str, PodMarks]) -> bool:
        name, marks = item
        try:
            pod = await self._api.patch_metadata(
                POD,
                self._namespace,
                name,
                labels={POOL_LABEL: marks.pool, FUNCTION_LABEL: marks.function},
                annotations={FUNCTIONS_ANNOTATION: marks.functions},
            )
        except NotFound:
            return True
        except ApiError as error:
            logger.warning("pod %s: its labels could not be changed: %s", name, error)
            return False
        self._pods.put(pod)
        return True


def _as_json(functions: Iterable[FunctionSpec]) -> str:
    """Return the functions as JSON, as many as an annotation should have."""
    shown: list[dict[str, Any]] = []
    n_chars = 2
    for spec in functions:
        entry = {
            "id": spec.id,
            "layers": format_ranges(spec.layers),
            "experts": format_ranges(spec.experts),
        }
        n_chars += len(json.dumps(entry)) + 2
        if n_chars > MAX_ANNOTATION_CHARS:
            break
        shown.append(entry)
    return json.dumps(shown)
