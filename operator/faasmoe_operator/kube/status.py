"""The status of a MoEModel, and when it is worth a request. Pure.

What somebody may wait for is written at once; numbers that move with the traffic are written
seldom, as each write goes to every client that watches the object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from faasmoe_operator.kube.counts import CoreCounts
from faasmoe_operator.kube.kinds import Object
from faasmoe_operator.kube.manifests import ModelContext, model_url, tenant_url
from faasmoe_operator.kube.manifests.names import Component, selector_text
from faasmoe_operator.kube.router_state import RouterState

COUNTS_INTERVAL_S = 10.0


@dataclass(frozen=True, slots=True)
class Written:
    """The status that was written last.

    Attributes:
        status: what was sent.
        result: what the server made of it: an older CRD drops fields that it does not know.
        at: when.
    """

    status: Object
    result: Any
    at: float


def model_status(
    ctx: ModelContext,
    *,
    conditions: Sequence[Object],
    router: RouterState,
    counts: CoreCounts | None,
    before: Mapping[str, Any],
) -> Object:
    """Return the whole status.

    Args:
        ctx: the model.
        conditions: its conditions.
        router: how its routers are doing.
        counts: what its control core counts.
        before: the status as it is: what it says of the store is kept while that is looked at
            again, and what it counts until a new operator process has counted.
    """
    model = before.get("model") if ctx.summary is None else ctx.summary.to_status()
    return {
        "observedGeneration": ctx.generation,
        "url": model_url(ctx),
        "conditions": list(conditions),
        **({} if model is None else {"model": model}),
        "router": {
            "replicas": router.replicas,
            "readyReplicas": router.ready,
            "selector": selector_text(ctx.name, Component.ROUTER),
        },
        **_counted(ctx, counts, before),
        **_tenants(ctx, counts, before),
    }


def invalid_status(before: Mapping[str, Any], conditions: Sequence[Object], *, at: int) -> Object:
    """Return the status of a model whose spec, of generation `at`, cannot be used."""
    return {**before, "observedGeneration": at, "conditions": list(conditions)}


def due_at(wanted: Object, live: Any, last: Written | None, *, now: float) -> float | None:
    """Return from when a status is to be written; None if that would change nothing.

    Args:
        wanted: the status.
        live: the object's.
        last: what was written last.
        now: the time.
    """
    if wanted == live:
        return None
    if last is None:
        return now
    if last.status == wanted and last.result == live:
        return None
    if _awaited(last.status) == _awaited(wanted) and last.result == live:
        return last.at + COUNTS_INTERVAL_S
    return now


def _counted(ctx: ModelContext, counts: CoreCounts | None, before: Mapping[str, Any]) -> Object:
    if counts is None:
        fields = () if ctx.spec.suspend else ("functions", "sandboxes")
        return {field: before[field] for field in fields if field in before}
    functions = {"total": counts.functions, "active": counts.active, "replicas": counts.replicas}
    sandboxes = {"total": counts.sandboxes, "ready": counts.ready, "generic": counts.generic}
    return {"functions": functions, "sandboxes": sandboxes}


def _tenants(ctx: ModelContext, counts: CoreCounts | None, before: Mapping[str, Any]) -> Object:
    if not ctx.spec.tenants:
        return {}
    keys = {tenant["name"]: tenant.get("keys") for tenant in before.get("tenants", ())}
    if counts is not None and counts.tenant_keys is not None:
        keys = dict(counts.tenant_keys)
    tenants = [
        {
            "name": tenant.name,
            "url": tenant_url(ctx, tenant.name),
            **({} if keys.get(tenant.name) is None else {"keys": keys[tenant.name]}),
        }
        for tenant in ctx.spec.tenants
    ]
    return {"tenants": tenants}


def _awaited(status: Mapping[str, Any]) -> Object:
    """Return what of a status is written at once: all but counts and what tells them."""
    conditions = [
        {key: value for key, value in condition.items() if key != "message"}
        for condition in status.get("conditions", ())
    ]
    slow = ("functions", "sandboxes", "conditions")
    rest = {key: value for key, value in status.items() if key not in slow}
    return {**rest, "conditions": conditions}
