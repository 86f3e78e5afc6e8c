"""One visit to one MoEModel: look at all of it, do what is missing, say how it is. Level-based.

A visit reads only the cache and asks the API server for nothing but changes, so one at which all
is well costs no request. What it remembers saves requests; a new process misses none of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Protocol

from faasmoe_operator.errors import MoEModelError, PlanError, PlatformError
from faasmoe_operator.kube.actions import (
    Action,
    object_id,
)
from faasmoe_operator.kube.api import KubeApi
from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.conditions import conditions
from faasmoe_operator.kube.counts import CoreCounts
from faasmoe_operator.kube.errors import Conflict, NotFound
from faasmoe_operator.kube.events import EventWriter, state_events
from faasmoe_operator.kube.judgement import judge, judge_invalid
from faasmoe_operator.kube.keys import ModelKey
from faasmoe_operator.kube.kinds import MOEMODEL, POD, Object
from faasmoe_operator.kube.manifests import ModelContext, store_objects
from faasmoe_operator.kube.observation import Observation, observe
from faasmoe_operator.kube.ownership import Owner
from faasmoe_operator.kube.planner import Planner
from faasmoe_operator.kube.router_state import router_state
from faasmoe_operator.kube.status import Written, due_at, invalid_status, model_status
from faasmoe_operator.kube.surroundings import Surroundings
from faasmoe_operator.kube.verdict import Verdict, bad
from faasmoe_operator.kube.writer import Problem, Writer
from faasmoe_operator.spec import MoEModel

logger = logging.getLogger(__name__)

REVISIT_S = 600.0
"""A visit without a cause, in case one was missed: it costs no request."""


class Cores(Protocol):
    """The control cores of all models."""

    async def ensure(self, ctx: ModelContext) -> None:
        """Have a model's core run as its context says; raises FaasmoeError."""
        ...

    async def remove(self, key: ModelKey, *, delete_sandboxes: bool) -> None:
        """End a model's core, if it has one."""
        ...

    def counts(self, key: ModelKey) -> CoreCounts | None:
        """Return what a model's core counts; None without one."""
        ...


@dataclass(frozen=True, slots=True)
class Visit:
    """What came of a visit.

    Attributes:
        again_s: when to come again though nothing happens; None for never.
        is_troubled: something was refused: come again with a back-off.
    """

    again_s: float | None
    is_troubled: bool = False


@dataclass(slots=True)
class _Memory:
    """What is remembered of a model between visits, to save requests and time.

    Attributes:
        writer: knows what was applied.
        planner: knows what was all right.
        written: the status that was written.
    """

    writer: Writer
    planner: Planner
    written: Written | None = None


class Reconciler:
    """Visits MoEModels.

    Args:
        api: the API server.
        cache: what it has told.
        cores: the control cores.
        surroundings: what all models have in common.
        events: writes events.
        clock: a clock that only goes forward.
        wall: the day's clock, in seconds.
    """

    def __init__(
        self,
        api: KubeApi,
        cache: ObjectCache,
        cores: Cores,
        surroundings: Surroundings,
        *,
        events: EventWriter,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._api, self._cache, self._cores = api, cache, cores
        self._surroundings, self._events = surroundings, events
        self._clock, self._wall = clock, wall
        self._memories: dict[ModelKey, _Memory] = {}

    async def reconcile(self, key: ModelKey) -> Visit:
        """Visit a MoEModel; raises Unavailable if the API server is away."""
        obj = self._cache.get(MOEMODEL, key.namespace, key.name)
        if obj is None or "deletionTimestamp" in obj["metadata"]:
            await self._cores.remove(key, delete_sandboxes=False)
            self._memories.pop(key, None)
            return Visit(None)
        memory = self._memory(key, obj)
        try:
            model = MoEModel.from_object(obj)
        except MoEModelError as error:
            return await self._refuse(obj, memory, error)
        return await self._visit(key, obj, self._surroundings.context(model, obj), memory)

    def _memory(self, key: ModelKey, obj: Object) -> _Memory:
        uid = obj["metadata"]["uid"]
        memory = self._memories.get(key)
        if memory is None or memory.writer.owner.uid != uid:
            owner = Owner(uid, key.name)
            writer = Writer(self._api, self._cache, owner, clock=self._clock)
            memory = self._memories[key] = _Memory(writer, Planner(self._cache, writer))
        return memory

    async def _visit(self, key: ModelKey, obj: Object, ctx: ModelContext, memory: _Memory) -> Visit:
        known_model = obj.get("status", {}).get("model")
        seen = observe(self._cache, ctx, known_model=known_model)
        ctx = replace(ctx, summary=seen.store.summary)
        plan = memory.planner.plan(ctx, seen, now=self._clock(), wall_s=self._wall())
        problems = await self._carry_out(plan.actions, memory)
        fault = await self._run_core(key, ctx, seen)
        counts = self._cores.counts(key)
        router = router_state(seen.deployment, seen.router_pods, wanted=ctx.spec.router.replicas)
        if {seen.store.secret, router.secret} - {None}:
            memory.planner.forget()
        verdicts = judge(
            ctx,
            seen,
            router=router,
            counts=counts,
            fault=fault,
            problems=problems,
            store_ids={object_id(wanted) for wanted in store_objects(ctx)} if problems else (),
            before=_conditions(obj),
        )
        status = model_status(
            ctx,
            conditions=conditions(
                verdicts, _conditions(obj), generation=ctx.generation, now=self._time()
            ),
            router=router,
            counts=counts,
            before=obj.get("status", {}),
        )
        status_at = await self._tell(obj, status, memory)
        return self._come_again(seen, plan.again_at, status_at, is_troubled=bool(problems))

    async def _carry_out(self, actions: tuple[Action, ...], memory: _Memory) -> list[Problem]:
        done = [await memory.writer.carry_out(action) for action in actions]
        return [problem for problem in done if problem is not None]

    async def _run_core(
        self, key: ModelKey, ctx: ModelContext, seen: Observation
    ) -> Verdict | None:
        """Have the control core run or not; return why it cannot."""
        if ctx.spec.suspend:
            await self._cores.remove(key, delete_sandboxes=True)
            for pod in seen.sandbox_pods:
                await self._delete_pod(pod)
            return None
        if ctx.summary is None:
            return None
        try:
            await self._cores.ensure(ctx)
        except PlanError as error:
            return bad("GranularityInvalid", str(error))
        except MoEModelError as error:
            return bad("StoreMismatch", str(error))
        except PlatformError as error:
            return bad("SandboxesUnavailable", str(error))
        return None

    async def _delete_pod(self, pod: Object) -> None:
        metadata = pod["metadata"]
        if "deletionTimestamp" not in metadata:
            await self._api.delete(
                POD, metadata["namespace"], metadata["name"], uid=metadata["uid"]
            )

    async def _refuse(self, obj: Object, memory: _Memory, error: MoEModelError) -> Visit:
        """Say that a spec cannot be used; what runs is left as it is."""
        generation = obj["metadata"].get("generation", 0)
        verdicts = judge_invalid(error.problems)
        found = conditions(verdicts, _conditions(obj), generation=generation, now=self._time())
        status = invalid_status(obj.get("status", {}), found, at=generation)
        await self._tell(obj, status, memory)
        return Visit(REVISIT_S)

    async def _tell(self, obj: Object, status: Object, memory: _Memory) -> float | None:
        """Write the status if it is time; return when it will be, if it is not."""
        now = self._clock()
        at = due_at(status, obj.get("status"), memory.written, now=now)
        if at is None or at > now:
            return at
        metadata = obj["metadata"]
        place = metadata["namespace"], metadata["name"]
        try:
            result = await self._api.patch_status(MOEMODEL, *place, status, uid=metadata["uid"])
        except (NotFound, Conflict):
            return None  # it is gone, and the watch will say so
        self._cache.put(MOEMODEL, result)
        memory.written = Written(status, result.get("status"), now)
        for event in state_events(_conditions(obj), status["conditions"]):
            logger.info("%s/%s: %s: %s", *place, event.reason, event.note)
            await self._events.write(obj, event, now=self._time())
        return None

    def _come_again(
        self,
        seen: Observation,
        again_at: float | None,
        status_at: float | None,
        *,
        is_troubled: bool,
    ) -> Visit:
        now = self._clock()
        delays_s = [REVISIT_S, *(at - now for at in (again_at, status_at) if at is not None)]
        if seen.store.retry_at is not None:
            delays_s.append(seen.store.retry_at - self._wall())
        return Visit(max(0.0, min(delays_s)), is_troubled)

    def _time(self) -> str:
        return datetime.fromtimestamp(self._wall(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _conditions(obj: Object) -> list[Object]:
    found: list[Object] = obj.get("status", {}).get("conditions", [])
    return found
