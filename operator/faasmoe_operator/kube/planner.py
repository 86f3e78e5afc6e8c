"""Observes one model in the cache and plans actions for it.

A Planner remembers the last state that needed no action, so that a reconcile without changes skips
the diff.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from faasmoe_operator.kube.apply import Applier
from faasmoe_operator.kube.cache import ObjectCache, controller_uid
from faasmoe_operator.kube.component_status import next_pod_failure_at
from faasmoe_operator.kube.diff import (
    ActionPlan,
    ObjectAction,
    ObjectId,
    ReplaceObject,
    object_id,
    plan_actions,
)
from faasmoe_operator.kube.manifests import ModelContext, serving_objects, store_objects
from faasmoe_operator.kube.manifests.names import (
    COMPONENT_LABEL,
    Component,
    router_name,
    store_name,
)
from faasmoe_operator.kube.manifests.store import store_names_by_path
from faasmoe_operator.kube.store_status import (
    StoreStatus,
    failed_attempts,
    store_status,
    with_failed_attempts,
)
from faasmoe_operator.kube.types import DEPLOYMENT, JOB, POD, Object, kind_of

ResourceVersions = dict[ObjectId, str]


@dataclass(frozen=True, slots=True)
class ObservedState:
    """Observed state of one model.

    Attributes:
        job: the store Job; None if it does not exist.
        store: status of the store.
        deployment: the router Deployment; None if it does not exist.
        router_pods: the router pods.
        sandbox_pods: the sandbox pods.
        pod_failure_at: when the next pod that waits for its claim counts as failed, in Unix time;
            None if none waits.
    """

    job: Object | None
    store: StoreStatus
    deployment: Object | None
    router_pods: list[Object]
    sandbox_pods: list[Object]
    pod_failure_at: float | None


def observe_model(
    cache: ObjectCache, ctx: ModelContext, *, status_model: Any, wall_clock_s: float
) -> ObservedState:
    """Return the observed state of a model.

    Args:
        cache: the object cache.
        ctx: the model.
        status_model: its current `status.model`.
        wall_clock_s: Unix time, in seconds.
    """
    job = _if_owned(cache.get(JOB, ctx.namespace, store_name(ctx.name)), ctx)
    pods = cache.labelled_with_model(ctx.namespace, ctx.name, POD)
    uid = None if job is None else job["metadata"]["uid"]
    job_pods = [] if uid is None else [pod for pod in pods if controller_uid(pod) == uid]
    return ObservedState(
        job=job,
        store=store_status(
            job,
            job_pods,
            status_model=status_model,
            wall_clock_s=wall_clock_s,
            names_by_path=store_names_by_path(ctx),
        ),
        deployment=_if_owned(cache.get(DEPLOYMENT, ctx.namespace, router_name(ctx.name)), ctx),
        router_pods=_with_component(pods, Component.ROUTER),
        sandbox_pods=[
            pod for pod in _with_component(pods, Component.SANDBOX) if _is_owned(pod, ctx)
        ],
        pod_failure_at=next_pod_failure_at(pods, wall_clock_s=wall_clock_s),
    )


def live_objects(cache: ObjectCache, ctx: ModelContext, desired: Iterable[Object]) -> list[Object]:
    """Return the objects that the model owns, and those with the name of a desired one."""
    live_by_id: dict[ObjectId, Object] = {object_id(obj): obj for obj in cache.owned_by(ctx.uid)}
    for obj in desired:
        live = cache.get(kind_of(obj), ctx.namespace, obj["metadata"]["name"])
        if live is not None:
            live_by_id[object_id(obj)] = live
    return list(live_by_id.values())


def _if_owned(obj: Object | None, ctx: ModelContext) -> Object | None:
    return obj if obj is not None and _is_owned(obj, ctx) else None


def _is_owned(obj: Object, ctx: ModelContext) -> bool:
    return controller_uid(obj) == ctx.uid


def _with_component(pods: Iterable[Object], component: Component) -> list[Object]:
    return [pod for pod in pods if pod["metadata"]["labels"].get(COMPONENT_LABEL) == component]


class Planner:
    """Plans the actions for one model.

    Args:
        cache: the object cache.
        applier: records what was applied.
    """

    def __init__(self, cache: ObjectCache, applier: Applier) -> None:
        self._cache = cache
        self._applier = applier
        self._n_failed_attempts = 0  # store Jobs that failed
        self._last_noop: tuple[ModelContext, ResourceVersions] | None = None
        """The state, with object versions, for which the last plan was empty."""

    def invalidate(self) -> None:
        """Discard what is remembered, so that missing Secrets are created again."""
        self._applier.invalidate_secrets()
        self._last_noop = None

    def plan(
        self, ctx: ModelContext, observed: ObservedState, *, now: float, wall_clock_s: float
    ) -> ActionPlan:
        """Return the actions; none without a diff if nothing changed since an empty plan.

        Args:
            ctx: the model's context.
            observed: the observed state.
            now: the monotonic clock, in seconds.
            wall_clock_s: Unix time, in seconds.
        """
        state = ctx, self._resource_versions(ctx)
        if state == self._last_noop and observed.store.retry_at is None:
            return ActionPlan(())
        plan = self._compute_plan(ctx, observed, now=now, wall_clock_s=wall_clock_s)
        self._last_noop = None if plan.actions or plan.requeue_at is not None else state
        return plan

    def _resource_versions(self, ctx: ModelContext) -> ResourceVersions:
        owned = self._cache.labelled_with_model(ctx.namespace, ctx.name) + self._cache.owned_by(
            ctx.uid
        )
        planned = [obj for obj in owned if obj["kind"] != POD.name]
        return {object_id(obj): obj["metadata"]["resourceVersion"] for obj in planned}

    def _compute_plan(
        self, ctx: ModelContext, observed: ObservedState, *, now: float, wall_clock_s: float
    ) -> ActionPlan:
        if observed.job is not None:
            self._n_failed_attempts = failed_attempts(observed.job)
        desired = [self._with_attempt_annotation(obj) for obj in store_objects(ctx)]
        if ctx.summary is not None:
            desired += serving_objects(ctx)
        plan = plan_actions(
            desired,
            live_objects(self._cache, ctx, desired),
            owner=self._applier.owner,
            last_applied=self._applier.last_applied,
            prune=ctx.summary is not None,
            now=now,
        )
        return replace(
            plan, actions=self._with_job_retry(plan.actions, ctx, observed, wall_clock_s)
        )

    def _with_attempt_annotation(self, desired: Object) -> Object:
        return (
            with_failed_attempts(desired, self._n_failed_attempts)
            if kind_of(desired) == JOB
            else desired
        )

    def _with_job_retry(
        self,
        actions: tuple[ObjectAction, ...],
        ctx: ModelContext,
        observed: ObservedState,
        wall_clock_s: float,
    ) -> tuple[ObjectAction, ...]:
        """Add the replacement of a failed store Job if its back-off has ended."""
        is_replaced = any(isinstance(action, ReplaceObject) for action in actions)
        if is_replaced:
            self._n_failed_attempts = 0  # a changed Job starts from zero
        retry_at = observed.store.retry_at
        if is_replaced or retry_at is None or ctx.spec.suspend or wall_clock_s < retry_at:
            return actions
        assert observed.job is not None
        self._n_failed_attempts = failed_attempts(observed.job) + 1
        return (*actions, ReplaceObject(observed.job))
