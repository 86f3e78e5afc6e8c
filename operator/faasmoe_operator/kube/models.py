"""The control cores of all models in one operator.

`ensure` and `remove` are the reconciler's, `find` is the control API's. Nothing that happens to one
core is felt by another, or by the reconciler.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator

from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.parallel import for_each
from faasmoe_operator.kube.blueprint import Blueprint
from faasmoe_operator.kube.core import Grounds, ModelCore
from faasmoe_operator.kube.counts import CoreCounts
from faasmoe_operator.kube.keys import ModelKey
from faasmoe_operator.kube.kinds import POD, Object
from faasmoe_operator.kube.manifests import ModelContext
from faasmoe_operator.kube.manifests.names import COMPONENT_LABEL, Component

logger = logging.getLogger(__name__)

PARALLEL_CALLS = 8


class ModelCores:
    """All control cores.

    Args:
        grounds: what cores stand on.
        on_change: told when what a model's core counts has changed; a few times a second at most.
    """

    def __init__(self, grounds: Grounds, *, on_change: Callable[[ModelKey], None]) -> None:
        self._grounds = grounds
        self._on_change = on_change
        self._cores: dict[ModelKey, ModelCore] = {}

    async def ensure(self, ctx: ModelContext) -> None:
        """Have a model's core run as its context says; raises PlanError and changes nothing then.

        A core whose functions, scaling, template or pool have changed begins anew, and so does that
        of a MoEModel that was made anew under its name.
        """
        key = ModelKey(ctx.namespace, ctx.name)
        core = self._cores.get(key)
        if core is not None and core.blueprint.ctx == ctx:
            return
        blueprint = Blueprint.of(ctx)
        if core is None:
            self._start(key, blueprint)
        elif core.blueprint.uid != blueprint.uid:
            await core.end()
            self._start(key, blueprint)
        elif core.blueprint != blueprint:
            logger.info("%s: its functions or sandboxes are to be others", key)
            core.replace(blueprint)
        else:
            core.blueprint = blueprint

    async def remove(self, key: ModelKey, *, delete_sandboxes: bool) -> None:
        """End a model's core, if it has one; raises ApiError if a sandbox could not be deleted.

        Args:
            key: the model.
            delete_sandboxes: whether its pods are deleted here; the garbage collector does it where
                the MoEModel goes too.
        """
        core = self._cores.pop(key, None)
        if core is None:
            return
        await core.end()
        if delete_sandboxes:
            await for_each(self._sandboxes(core), self._delete, limit=PARALLEL_CALLS)

    def find(self, namespace: str, name: str) -> tuple[Controller, str] | None:
        """Return a model's controller and its token; None while it has none."""
        core = self._cores.get(ModelKey(namespace, name))
        if core is None or core.controller is None:
            return None
        return core.controller, core.blueprint.token

    def counts(self, key: ModelKey) -> CoreCounts | None:
        """Return what a model's core counts; None before that is known."""
        core = self._cores.get(key)
        return None if core is None else core.counts()

    def controllers(self) -> Iterator[tuple[ModelKey, Controller]]:
        """Give every controller that runs, by the models' names."""
        for key in sorted(self._cores):
            if (controller := self._cores[key].controller) is not None:
                yield key, controller

    async def end(self) -> None:
        """End every core; the sandboxes go on."""
        cores = list(self._cores.values())
        self._cores.clear()
        await asyncio.gather(*(core.end() for core in cores))

    def _start(self, key: ModelKey, blueprint: Blueprint) -> None:
        core = ModelCore(blueprint, self._grounds, on_change=lambda: self._on_change(key))
        self._cores[key] = core
        core.start()

    def _sandboxes(self, core: ModelCore) -> list[Object]:
        pods = self._grounds.cache.owned(core.blueprint.uid, POD)
        return [
            pod
            for pod in pods
            if pod["metadata"].get("labels", {}).get(COMPONENT_LABEL) == Component.SANDBOX
            and "deletionTimestamp" not in pod["metadata"]
        ]

    async def _delete(self, pod: Object) -> None:
        metadata = pod["metadata"]
        await self._grounds.api.delete(
            POD,
            metadata["namespace"],
            metadata["name"],
            uid=metadata["uid"],
            grace_s=self._grounds.pod_timing.grace_s,
        )
