"""Reconciles one MoEModel: observe, plan, apply, update its runtime and its status. Level-based.

A reconcile reads only the cache and sends only changes, so that one without changes costs no
request. What it remembers between reconciles saves requests and is not needed for correctness.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import groupby
from typing import Protocol

from faasmoe_operator.aio import gather_limited
from faasmoe_operator.api.v1alpha1 import MoEModel
from faasmoe_operator.errors import MoEModelError, PlanError, PlatformError
from faasmoe_operator.kube.apply import Applier, ApplyFailure
from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.client import KubeApi
from faasmoe_operator.kube.component_status import RuntimeCounts, router_status
from faasmoe_operator.kube.conditions import ConditionState, build_conditions, condition_false
from faasmoe_operator.kube.context import OperatorContext
from faasmoe_operator.kube.diff import (
    ApplyObject,
    CreateObject,
    ObjectAction,
    Owner,
    object_id,
)
from faasmoe_operator.kube.errors import Conflict, NamespaceTerminating, NotFound
from faasmoe_operator.kube.events import EventRecorder, transition_events
from faasmoe_operator.kube.manifests import ModelContext, store_objects
from faasmoe_operator.kube.planner import ObservedState, Planner, observe_model
from faasmoe_operator.kube.status import (
    WrittenStatus,
    evaluate_conditions,
    evaluate_invalid_spec,
    invalid_status,
    model_status,
    status_write_at,
)
from faasmoe_operator.kube.types import MOEMODEL, POD, Kind, ModelKey, Object, kind_of
from faasmoe_tracing import NO_TRACER, Span, Tracer

logger = logging.getLogger(__name__)

RESYNC_PERIOD_S = 600.0
"""Period of reconciles without a change. They cost no request."""

PARALLEL_REQUESTS = 10
"""Objects of one model that are written at the same time."""


class ModelRuntimes(Protocol):
    """The runtimes of all models; RuntimeManager implements it."""

    async def ensure(self, ctx: ModelContext) -> None:
        """Start or update a model's runtime; raises FaasmoeError."""
        ...

    async def remove(self, key: ModelKey, *, delete_sandboxes: bool) -> None:
        """Stop a model's runtime, if it has one."""
        ...

    def counts(self, key: ModelKey) -> RuntimeCounts | None:
        """Return the counters of a model's runtime; None without one."""
        ...


@dataclass(frozen=True, slots=True)
class ReconcileResult:
    """Outcome of a reconcile.

    Attributes:
        requeue_after_s: delay until the next reconcile without a change, in seconds; None for none.
        has_failures: whether the API rejected an object: retry with back-off.
    """

    requeue_after_s: float | None
    has_failures: bool = False


@dataclass(slots=True)
class _ModelState:
    """State of a model between reconciles. It only saves requests and time.

    Attributes:
        applier: records what was applied.
        planner: remembers the last state that needed no action.
        last_status: the last status update; None before the first.
    """

    applier: Applier
    planner: Planner
    last_status: WrittenStatus | None = None


class Reconciler:
    """Reconciles MoEModels.

    Args:
        api: the API server.
        cache: the object cache.
        runtimes: the runtimes of all models.
        context: what all models have in common.
        events: records Kubernetes events.
        tracer: traces reconciles.
        clock: monotonic clock, in seconds.
        wall_clock: Unix time, in seconds.
    """

    def __init__(
        self,
        api: KubeApi,
        cache: ObjectCache,
        runtimes: ModelRuntimes,
        context: OperatorContext,
        *,
        events: EventRecorder,
        tracer: Tracer = NO_TRACER,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._api, self._cache, self._runtimes = api, cache, runtimes
        self._context, self._events = context, events
        self._tracer = tracer
        self._clock, self._wall_clock = clock, wall_clock
        self._states: dict[ModelKey, _ModelState] = {}

    async def reconcile(self, key: ModelKey) -> ReconcileResult:
        """Reconcile one MoEModel; raises Unavailable if the API server does not respond."""
        with self._tracer.span(
            "reconcile",
            attributes={"k8s.namespace.name": key.namespace, "faasmoe.model": key.name},
        ) as span:
            result = await self._reconcile(key, span)
            if result.has_failures:
                span.fail("apply_failed")
            return result

    async def _reconcile(self, key: ModelKey, span: Span) -> ReconcileResult:
        obj = self._cache.get(MOEMODEL, key.namespace, key.name)
        if obj is None or "deletionTimestamp" in obj["metadata"]:
            await self._runtimes.remove(key, delete_sandboxes=False)
            self._states.pop(key, None)
            return ReconcileResult(None)
        state = self._model_state(key, obj)
        try:
            model = MoEModel.from_object(obj)
        except MoEModelError as error:
            return await self._report_invalid_spec(obj, state, error)
        ctx = self._context.model_context(model, obj)
        try:
            return await self._reconcile_model(key, obj, ctx, state, span)
        except NamespaceTerminating:
            logger.info("%s: its namespace is being deleted", key)
            await self._runtimes.remove(key, delete_sandboxes=False)
            return ReconcileResult(RESYNC_PERIOD_S)

    def _model_state(self, key: ModelKey, obj: Object) -> _ModelState:
        uid = obj["metadata"]["uid"]
        state = self._states.get(key)
        if state is None or state.applier.owner.uid != uid:
            owner = Owner(uid, key.name)
            applier = Applier(self._api, self._cache, owner, clock=self._clock)
            state = self._states[key] = _ModelState(applier, Planner(self._cache, applier))
        return state

    async def _reconcile_model(
        self, key: ModelKey, obj: Object, ctx: ModelContext, state: _ModelState, span: Span
    ) -> ReconcileResult:
        status_model = obj.get("status", {}).get("model")
        wall_clock_s = self._wall_clock()
        observed = observe_model(
            self._cache, ctx, status_model=status_model, wall_clock_s=wall_clock_s
        )
        ctx = replace(ctx, summary=observed.store.summary)
        plan = state.planner.plan(ctx, observed, now=self._clock(), wall_clock_s=wall_clock_s)
        with span.child("apply", attributes={"faasmoe.actions": len(plan.actions)}):
            failures = await self._apply_actions(plan.actions, state)
        runtime_failure = await self._ensure_runtime(key, ctx, observed)
        counts = self._runtimes.counts(key)
        router = router_status(
            observed.deployment,
            observed.router_pods,
            desired_replicas=ctx.router_replicas,
            wall_clock_s=wall_clock_s,
        )
        if {observed.store.missing_secret, router.missing_secret} - {None}:
            state.planner.invalidate()
        condition_states = evaluate_conditions(
            ctx,
            observed,
            router=router,
            counts=counts,
            runtime_failure=runtime_failure,
            failures=failures,
            store_ids={object_id(desired) for desired in store_objects(ctx)} if failures else (),
            previous=_conditions_of(obj),
            wall_clock_s=wall_clock_s,
        )
        status = model_status(
            ctx,
            conditions=build_conditions(
                condition_states,
                _conditions_of(obj),
                generation=ctx.generation,
                now=self._timestamp(),
            ),
            router=router,
            counts=counts,
            previous=obj.get("status", {}),
        )
        with span.child("status"):
            status_at = await self._write_status(obj, status, state)
        return self._result(observed, plan.requeue_at, status_at, has_failures=bool(failures))

    async def _apply_actions(
        self, actions: tuple[ObjectAction, ...], state: _ModelState
    ) -> list[ApplyFailure]:
        """Execute the actions in order; those on objects of one kind in a row concurrently."""
        failures: list[ApplyFailure] = []
        for _, same_kind in groupby(actions, key=_action_kind):
            results = await gather_limited(
                same_kind, state.applier.execute, limit=PARALLEL_REQUESTS
            )
            failures += [failure for failure in results if failure is not None]
        return failures

    async def _ensure_runtime(
        self, key: ModelKey, ctx: ModelContext, observed: ObservedState
    ) -> ConditionState | None:
        """Start, update or remove the model's runtime; return a condition state if it fails."""
        if ctx.spec.suspend:
            await self._runtimes.remove(key, delete_sandboxes=True)
            for pod in observed.sandbox_pods:
                await self._delete_pod(pod)
            return None
        if ctx.summary is None:
            return None
        try:
            await self._runtimes.ensure(ctx)
        except PlanError as error:
            return condition_false("GranularityInvalid", str(error))
        except MoEModelError as error:
            return condition_false("StoreMismatch", str(error))
        except PlatformError as error:
            return condition_false("SandboxesUnavailable", str(error))
        return None

    async def _delete_pod(self, pod: Object) -> None:
        metadata = pod["metadata"]
        if "deletionTimestamp" not in metadata:
            await self._api.delete(
                POD, metadata["namespace"], metadata["name"], uid=metadata["uid"]
            )

    async def _report_invalid_spec(
        self, obj: Object, state: _ModelState, error: MoEModelError
    ) -> ReconcileResult:
        """Report an invalid spec; what runs is left unchanged."""
        generation = obj["metadata"].get("generation", 0)
        condition_states = evaluate_invalid_spec(error.problems)
        new_conditions = build_conditions(
            condition_states, _conditions_of(obj), generation=generation, now=self._timestamp()
        )
        status = invalid_status(obj.get("status", {}), new_conditions, generation=generation)
        await self._write_status(obj, status, state)
        return ReconcileResult(RESYNC_PERIOD_S)

    async def _write_status(self, obj: Object, status: Object, state: _ModelState) -> float | None:
        """Write the status if it is due; return when it will be due, or None."""
        now = self._clock()
        write_at = status_write_at(status, obj.get("status"), state.last_status, now=now)
        if write_at is None or write_at > now:
            return write_at
        metadata = obj["metadata"]
        key = metadata["namespace"], metadata["name"]
        try:
            result = await self._api.patch_status(MOEMODEL, *key, status, uid=metadata["uid"])
        except (NotFound, Conflict):
            return None  # deleted or recreated; a watch event follows
        self._cache.update(MOEMODEL, result)
        state.last_status = WrittenStatus(status, result.get("status"), now)
        for event in transition_events(_conditions_of(obj), status["conditions"]):
            logger.info("%s/%s: %s: %s", *key, event.reason, event.note)
            await self._events.record(obj, event, now=self._timestamp())
        return None

    def _result(
        self,
        observed: ObservedState,
        requeue_at: float | None,
        status_at: float | None,
        *,
        has_failures: bool,
    ) -> ReconcileResult:
        now = self._clock()
        delays_s = [
            RESYNC_PERIOD_S,
            *(at - now for at in (requeue_at, status_at) if at is not None),
        ]
        for at in (observed.store.retry_at, observed.pod_failure_at):
            if at is not None:
                delays_s.append(at - self._wall_clock())
        return ReconcileResult(max(0.0, min(delays_s)), has_failures)

    def _timestamp(self) -> str:
        return datetime.fromtimestamp(self._wall_clock(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _action_kind(action: ObjectAction) -> tuple[type[ObjectAction], Kind]:
    obj = action.desired if isinstance(action, CreateObject | ApplyObject) else action.live
    return type(action), kind_of(obj)


def _conditions_of(obj: Object) -> list[Object]:
    found: list[Object] = obj.get("status", {}).get("conditions", [])
    return found
