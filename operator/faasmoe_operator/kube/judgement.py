"""From what was seen and done at a visit to the state of every condition. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from faasmoe_operator.kube.actions import ObjectId
from faasmoe_operator.kube.conditions import READY, Verdicts, summed_up
from faasmoe_operator.kube.counts import CoreCounts
from faasmoe_operator.kube.functions_state import (
    active_verdict,
    functions_verdict,
    tenants_verdict,
)
from faasmoe_operator.kube.manifests import ModelContext, missing_apis
from faasmoe_operator.kube.observation import Observation
from faasmoe_operator.kube.router_state import RouterState
from faasmoe_operator.kube.verdict import Verdict, bad, pending
from faasmoe_operator.kube.writer import Problem

SUSPENDED = bad("Suspended", "spec.suspend is true: every pod is taken away, the store is kept")
WAITING = pending("WaitingForStore", "the store is not ready yet")


def judge(
    ctx: ModelContext,
    seen: Observation,
    *,
    router: RouterState,
    counts: CoreCounts | None,
    fault: str | None,
    problems: Sequence[Problem],
    store_ids: Collection[ObjectId],
) -> dict[str, Verdict]:
    """Return the state of each condition, Ready first.

    Args:
        ctx: the model.
        seen: what there is of it.
        router: how its routers are doing.
        counts: what its control core counts.
        fault: why the functions cannot be planned.
        problems: objects that could not be made as wanted.
        store_ids: the objects that the store needs; all others are the routers'.
    """
    of_store = [problem for problem in problems if problem.object_id in store_ids]
    of_router = [problem for problem in problems if problem.object_id not in store_ids]
    store = of_store[0].verdict if of_store else seen.store.verdict
    if ctx.spec.suspend:
        verdicts = Verdicts(store, SUSPENDED, SUSPENDED, SUSPENDED, SUSPENDED)
        return {READY: SUSPENDED, **verdicts.by_type()}
    if ctx.summary is None and counts is None:
        verdicts = Verdicts(store, WAITING, WAITING, WAITING, WAITING)
    else:
        verdicts = Verdicts(
            store=store,
            router=of_router[0].verdict if of_router else _router(ctx, router),
            functions=functions_verdict(counts, seen.sandbox_pods, fault=fault),
            tenants=tenants_verdict(ctx.spec.tenants, counts),
            active=active_verdict(counts),
        )
    return {READY: summed_up(verdicts), **verdicts.by_type()}


def judge_invalid(problems: Sequence[str]) -> Mapping[str, Verdict]:
    """Return the state of each condition of a model whose spec cannot be used."""
    invalid = bad("SpecInvalid", "; ".join(problems))
    unknown = pending("SpecInvalid", "the spec cannot be used: see Ready")
    return {READY: invalid, **Verdicts.all(unknown).by_type()}


def _router(ctx: ModelContext, router: RouterState) -> Verdict:
    missing = missing_apis(ctx)
    if not missing:
        return router.verdict
    text = "; ".join(
        f"{field} is given, and the cluster does not serve {api}: install its CRDs and restart "
        "the operator, or leave the field out"
        for field, api in missing.items()
    )
    return bad("ApiMissing", text)
