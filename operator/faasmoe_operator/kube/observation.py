"""What the cache holds of one model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from faasmoe_operator.kube.actions import ObjectId, object_id
from faasmoe_operator.kube.cache import ObjectCache, controller_uid
from faasmoe_operator.kube.kinds import DEPLOYMENT, JOB, POD, Object, kind_of
from faasmoe_operator.kube.manifests import ModelContext
from faasmoe_operator.kube.manifests.names import (
    COMPONENT_LABEL,
    Component,
    router_name,
    store_name,
)
from faasmoe_operator.kube.store_state import StoreState, store_state


@dataclass(frozen=True, slots=True)
class Observation:
    """One model as it is.

    Attributes:
        job: the store's Job.
        store: how the store is doing.
        deployment: the routers' Deployment.
        router_pods: the routers' pods.
        sandbox_pods: the sandboxes' pods.
    """

    job: Object | None
    store: StoreState
    deployment: Object | None
    router_pods: list[Object]
    sandbox_pods: list[Object]


def observe(cache: ObjectCache, ctx: ModelContext, *, known_model: Any) -> Observation:
    """Return what there is of a model.

    Args:
        cache: what the API server has told.
        ctx: the model.
        known_model: its `status.model`.
    """
    job = _ours(cache.get(JOB, ctx.namespace, store_name(ctx.name)), ctx)
    pods = cache.of_model(ctx.namespace, ctx.name, POD)
    uid = None if job is None else job["metadata"]["uid"]
    job_pods = [] if uid is None else [pod for pod in pods if controller_uid(pod) == uid]
    return Observation(
        job=job,
        store=store_state(job, job_pods, known=known_model),
        deployment=_ours(cache.get(DEPLOYMENT, ctx.namespace, router_name(ctx.name)), ctx),
        router_pods=_of(pods, Component.ROUTER),
        sandbox_pods=[pod for pod in _of(pods, Component.SANDBOX) if _is_owned(pod, ctx)],
    )


def live_objects(cache: ObjectCache, ctx: ModelContext, wanted: Iterable[Object]) -> list[Object]:
    """Return the objects that the model has, and whatever has the name of one that it wants."""
    found: dict[ObjectId, Object] = {object_id(obj): obj for obj in cache.owned(ctx.uid)}
    for obj in wanted:
        live = cache.get(kind_of(obj), ctx.namespace, obj["metadata"]["name"])
        if live is not None:
            found[object_id(obj)] = live
    return list(found.values())


def _ours(obj: Object | None, ctx: ModelContext) -> Object | None:
    return obj if obj is not None and _is_owned(obj, ctx) else None


def _is_owned(obj: Object, ctx: ModelContext) -> bool:
    return controller_uid(obj) == ctx.uid


def _of(pods: Iterable[Object], component: Component) -> list[Object]:
    return [pod for pod in pods if pod["metadata"]["labels"].get(COMPONENT_LABEL) == component]
