"""What is to be done for one MoEModel, and what is remembered of it so as to find out cheaply."""

from __future__ import annotations

from dataclasses import replace

from faasmoe_operator.kube.actions import (
    Action,
    Actions,
    ObjectId,
    Replace,
    object_id,
    plan_actions,
)
from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.kinds import JOB, POD, Object, kind_of
from faasmoe_operator.kube.manifests import ModelContext, serving_objects, store_objects
from faasmoe_operator.kube.observation import Observation, live_objects
from faasmoe_operator.kube.store_state import attempt_of, with_attempt
from faasmoe_operator.kube.writer import Writer

Versions = dict[ObjectId, str]


class Planner:
    """Plans for one model.

    Args:
        cache: what the API server has told.
        writer: knows what was applied.
    """

    def __init__(self, cache: ObjectCache, writer: Writer) -> None:
        self._cache = cache
        self._writer = writer
        self._attempt = 0  # Jobs of the store that failed
        self._calm: tuple[ModelContext, Versions] | None = None
        """What there was, in which versions, when nothing was to be done."""

    def forget(self) -> None:
        """Plan anew, Secrets too."""
        self._writer.forget_secrets()
        self._calm = None

    def plan(self, ctx: ModelContext, seen: Observation, *, now: float, wall_s: float) -> Actions:
        """Return what is to be done; what was all right and has not changed still is.

        Args:
            ctx: what is wanted.
            seen: what there is.
            now: of a clock that only goes forward, in seconds.
            wall_s: of the day's clock.
        """
        state = ctx, self._versions(ctx)
        if state == self._calm and seen.store.retry_at is None:
            return Actions(())
        plan = self._plan_anew(ctx, seen, now=now, wall_s=wall_s)
        self._calm = None if plan.actions or plan.again_at is not None else state
        return plan

    def _versions(self, ctx: ModelContext) -> Versions:
        ours = self._cache.of_model(ctx.namespace, ctx.name) + self._cache.owned(ctx.uid)
        planned = [obj for obj in ours if obj["kind"] != POD.name]
        return {object_id(obj): obj["metadata"]["resourceVersion"] for obj in planned}

    def _plan_anew(
        self, ctx: ModelContext, seen: Observation, *, now: float, wall_s: float
    ) -> Actions:
        if seen.job is not None:
            self._attempt = attempt_of(seen.job)
        wanted = [self._counted(wanted) for wanted in store_objects(ctx)]
        if ctx.summary is not None:
            wanted += serving_objects(ctx)
        plan = plan_actions(
            wanted,
            live_objects(self._cache, ctx, wanted),
            owner=self._writer.owner,
            applied=self._writer.applied,
            prune=ctx.summary is not None,
            now=now,
        )
        return replace(plan, actions=self._with_retry(plan.actions, ctx, seen, wall_s))

    def _counted(self, wanted: Object) -> Object:
        return with_attempt(wanted, self._attempt) if kind_of(wanted) == JOB else wanted

    def _with_retry(
        self, actions: tuple[Action, ...], ctx: ModelContext, seen: Observation, wall_s: float
    ) -> tuple[Action, ...]:
        """Add that the store's failed Job is replaced, if it is time."""
        replaced = any(isinstance(action, Replace) for action in actions)
        if replaced:
            self._attempt = 0  # its pods are to be other ones: what failed is mended
        retry_at = seen.store.retry_at
        if replaced or retry_at is None or ctx.spec.suspend or wall_s < retry_at:
            return actions
        assert seen.job is not None
        self._attempt = attempt_of(seen.job) + 1
        return (*actions, Replace(seen.job))
