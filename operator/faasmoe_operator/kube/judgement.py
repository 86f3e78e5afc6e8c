"""From what was seen and done at a visit to the state of every condition. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from faasmoe_operator.kube.actions import ObjectId
from faasmoe_operator.kube.conditions import (
    ACTIVE,
    FUNCTIONS_READY,
    READY,
    STORE_READY,
    TENANTS_READY,
    Verdicts,
    summed_up,
)
from faasmoe_operator.kube.counts import CoreCounts
from faasmoe_operator.kube.functions_state import (
    PLANNING,
    WAITING_FOR_ROUTER,
    active_verdict,
    functions_verdict,
    tenants_verdict,
)
from faasmoe_operator.kube.kinds import Object
from faasmoe_operator.kube.manifests import ModelContext, missing_apis
from faasmoe_operator.kube.observation import Observation
from faasmoe_operator.kube.router_state import RouterState
from faasmoe_operator.kube.store_state import FAILURES, StoreState
from faasmoe_operator.kube.verdict import Verdict, bad, pending
from faasmoe_operator.kube.writer import Problem

SUSPENDED = bad("Suspended", "spec.suspend is true: every pod is taken away, the store is kept")
READING_BACK = (PLANNING, WAITING_FOR_ROUTER)
WAITING = pending("WaitingForStore", "the store is not ready yet")


def judge(
    ctx: ModelContext,
    seen: Observation,
    *,
    router: RouterState,
    counts: CoreCounts | None,
    fault: Verdict | None,
    problems: Sequence[Problem],
    store_ids: Collection[ObjectId],
    before: Sequence[Object],
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
        before: the conditions that the object has.
    """
    of_store = [problem for problem in problems if problem.object_id in store_ids]
    of_router = [problem for problem in problems if problem.object_id not in store_ids]
    known = _known(before, generation=ctx.generation)
    store = of_store[0].verdict if of_store else _store(seen.store, known.get(STORE_READY))
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
    verdicts = _kept(verdicts, known)
    return {READY: summed_up(verdicts), **verdicts.by_type()}


def judge_invalid(problems: Sequence[str]) -> Mapping[str, Verdict]:
    """Return the state of each condition of a model whose spec cannot be used."""
    invalid = bad("SpecInvalid", "; ".join(problems))
    unknown = pending("SpecInvalid", "the spec cannot be used: see Ready")
    return {READY: invalid, **Verdicts.all(unknown).by_type()}


def _known(before: Sequence[Object], *, generation: int) -> dict[str, Verdict]:
    """Return what was settled of this spec."""
    return {
        condition["type"]: Verdict(condition["status"], condition["reason"], condition["message"])
        for condition in before
        if condition.get("observedGeneration") == generation and condition["status"] != "Unknown"
    }


def _store(state: StoreState, known: Verdict | None) -> Verdict:
    """Keep why the store failed until a new attempt has shown something else."""
    if state.is_retry and known is not None and known.reason in FAILURES:
        return known
    return state.verdict


def _kept(verdicts: Verdicts, known: Mapping[str, Verdict]) -> Verdicts:
    """Keep what was known while a new operator process reads it back."""

    def kept(kind: str, verdict: Verdict) -> Verdict:
        return known.get(kind, verdict) if verdict.reason in READING_BACK else verdict

    return replace(
        verdicts,
        functions=kept(FUNCTIONS_READY, verdicts.functions),
        tenants=kept(TENANTS_READY, verdicts.tenants),
        active=kept(ACTIVE, verdicts.active),
    )


def _router(ctx: ModelContext, router: RouterState) -> Verdict:
    missing = missing_apis(ctx)
    if not missing:
        return router.verdict
    text = "; ".join(
        f"{field} is given, and the cluster does not serve {api}: install its CRDs, which are then "
        "noticed, or leave the field out"
        for field, api in missing.items()
    )
    return bad("ApiMissing", text)
