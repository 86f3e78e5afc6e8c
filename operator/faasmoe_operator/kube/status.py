"""Conditions and status of a MoEModel, and when a status update is worth a request. Pure.

Changes that someone may wait for are written at once. Counters that follow the traffic are written
at most every COUNTS_INTERVAL_S, since each update is sent to every client that watches the object.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from faasmoe_operator.kube.apply import ApplyFailure
from faasmoe_operator.kube.component_status import (
    PLANNING,
    WAITING_FOR_ROUTER,
    RouterComponentStatus,
    RuntimeCounts,
    active_condition,
    functions_condition,
    tenants_condition,
)
from faasmoe_operator.kube.conditions import (
    ACTIVE,
    FUNCTIONS_READY,
    READY,
    STORE_READY,
    TENANTS_READY,
    ConditionState,
    ConditionStates,
    condition_false,
    condition_unknown,
    summarize_ready,
)
from faasmoe_operator.kube.diff import ObjectId
from faasmoe_operator.kube.manifests import ModelContext, missing_apis, model_url, tenant_url
from faasmoe_operator.kube.manifests.names import Component, pod_selector_text
from faasmoe_operator.kube.planner import ObservedState
from faasmoe_operator.kube.store_status import RETRYABLE_REASONS, StoreStatus
from faasmoe_operator.kube.types import Object

SUSPENDED = condition_false(
    "Suspended", "spec.suspend is true: pods are deleted, the store is retained"
)
RECOVERING_REASONS = (PLANNING, WAITING_FOR_ROUTER)
WAITING_FOR_STORE = condition_unknown("WaitingForStore", "the store is not ready yet")
COUNTS_INTERVAL_S = 10.0


def evaluate_conditions(
    ctx: ModelContext,
    observed: ObservedState,
    *,
    router: RouterComponentStatus,
    counts: RuntimeCounts | None,
    runtime_failure: ConditionState | None,
    failures: Sequence[ApplyFailure],
    store_ids: Collection[ObjectId],
    previous: Sequence[Object],
    wall_clock_s: float,
) -> dict[str, ConditionState]:
    """Return the state of each condition, Ready first.

    Args:
        ctx: the model.
        observed: its observed state.
        router: status of its routers.
        counts: counters of its runtime; None before it has started.
        runtime_failure: why the runtime cannot be started; None if it can.
        failures: objects that could not be brought to their desired state.
        store_ids: objects of the store; failures of all others count for RouterReady.
        previous: the MoEModel's current conditions.
        wall_clock_s: Unix time, in seconds.
    """
    store_failures = [failure for failure in failures if failure.object_id in store_ids]
    router_failures = [failure for failure in failures if failure.object_id not in store_ids]
    previous_states = _previous_states(previous, generation=ctx.generation)
    store = (
        store_failures[0].condition
        if store_failures
        else _store_condition(observed.store, previous_states.get(STORE_READY))
    )
    if ctx.spec.suspend:
        states = ConditionStates(store, SUSPENDED, SUSPENDED, SUSPENDED, SUSPENDED)
        return {READY: SUSPENDED, **states.by_type()}
    if ctx.summary is None and counts is None:
        states = ConditionStates(
            store, WAITING_FOR_STORE, WAITING_FOR_STORE, WAITING_FOR_STORE, WAITING_FOR_STORE
        )
    else:
        states = ConditionStates(
            store=store,
            router=router_failures[0].condition
            if router_failures
            else _router_condition(ctx, router),
            functions=functions_condition(
                counts,
                observed.sandbox_pods,
                runtime_failure=runtime_failure,
                wall_clock_s=wall_clock_s,
            ),
            tenants=tenants_condition(ctx.spec.tenants, counts, n_gateway_tenants=len(ctx.tenants)),
            active=active_condition(counts),
        )
    states = _retain_while_recovering(states, previous_states)
    return {READY: summarize_ready(states), **states.by_type()}


def evaluate_invalid_spec(problems: Sequence[str]) -> Mapping[str, ConditionState]:
    """Return the state of each condition of a model with an invalid spec."""
    invalid = condition_false("SpecInvalid", "; ".join(problems))
    unknown = condition_unknown("SpecInvalid", "the spec is invalid: see Ready")
    return {READY: invalid, **ConditionStates.uniform(unknown).by_type()}


def _previous_states(previous: Sequence[Object], *, generation: int) -> dict[str, ConditionState]:
    """Return the conditions of this generation that are True or False."""
    return {
        condition["type"]: ConditionState(
            condition["status"], condition["reason"], condition["message"]
        )
        for condition in previous
        if condition.get("observedGeneration") == generation and condition["status"] != "Unknown"
    }


def _store_condition(state: StoreStatus, previous: ConditionState | None) -> ConditionState:
    """Keep the failure of the last attempt until a retry has a result."""
    if state.is_retry and previous is not None and previous.reason in RETRYABLE_REASONS:
        return previous
    return state.condition


def _retain_while_recovering(
    states: ConditionStates, previous_states: Mapping[str, ConditionState]
) -> ConditionStates:
    """Keep previous states while a new operator process restores its runtimes."""

    def retained(kind: str, state: ConditionState) -> ConditionState:
        return previous_states.get(kind, state) if state.reason in RECOVERING_REASONS else state

    return replace(
        states,
        functions=retained(FUNCTIONS_READY, states.functions),
        tenants=retained(TENANTS_READY, states.tenants),
        active=retained(ACTIVE, states.active),
    )


def _router_condition(ctx: ModelContext, router: RouterComponentStatus) -> ConditionState:
    missing = missing_apis(ctx)
    if not missing:
        return router.condition
    text = "; ".join(
        f"{field} is given, and the cluster does not serve {api}: install its CRDs (detected "
        "automatically) or remove the field"
        for field, api in missing.items()
    )
    return condition_false("CRDNotInstalled", text)


@dataclass(frozen=True, slots=True)
class WrittenStatus:
    """The status update sent last.

    Attributes:
        status: the status that was sent.
        result: the status in the response; an older CRD drops fields that it does not know.
        written_at: when, by the monotonic clock, in seconds.
    """

    status: Object
    result: Any
    written_at: float


def model_status(
    ctx: ModelContext,
    *,
    conditions: Sequence[Object],
    router: RouterComponentStatus,
    counts: RuntimeCounts | None,
    previous: Mapping[str, Any],
) -> Object:
    """Return the complete status.

    Args:
        ctx: the model.
        conditions: its conditions.
        router: status of its routers.
        counts: counters of its runtime; None before it has started.
        previous: the current status. Its `model` is kept while the store is checked again, its
            counters until the runtime has started.
    """
    model = previous.get("model") if ctx.summary is None else ctx.summary.to_status()
    return {
        "observedGeneration": ctx.generation,
        "url": model_url(ctx),
        "conditions": list(conditions),
        **({} if model is None else {"model": model}),
        "router": {
            "replicas": router.replicas,
            "readyReplicas": router.ready_replicas,
            "selector": pod_selector_text(ctx.name, Component.ROUTER),
        },
        **_counter_fields(ctx, counts, previous),
        **_tenant_fields(ctx, counts, previous),
    }


def invalid_status(
    previous: Mapping[str, Any], conditions: Sequence[Object], *, generation: int
) -> Object:
    """Return the status of a model with an invalid spec; the previous status is kept."""
    return {**previous, "observedGeneration": generation, "conditions": list(conditions)}


def status_write_at(
    desired: Object, live: Any, last: WrittenStatus | None, *, now: float
) -> float | None:
    """Return when a status should be written; None if it would change nothing.

    Args:
        desired: the status to write.
        live: the object's current status.
        last: the last update; None if there was none.
        now: the monotonic clock, in seconds.
    """
    if desired == live:
        return None
    if last is None:
        return now
    if last.status == desired and last.result == live:
        return None
    if _without_counters(last.status) == _without_counters(desired) and last.result == live:
        return last.written_at + COUNTS_INTERVAL_S
    return now


def _counter_fields(
    ctx: ModelContext, counts: RuntimeCounts | None, previous: Mapping[str, Any]
) -> Object:
    if counts is None:
        fields = () if ctx.spec.suspend else ("functions", "sandboxes")
        return {field: previous[field] for field in fields if field in previous}
    functions = {"total": counts.functions, "active": counts.active, "replicas": counts.replicas}
    sandboxes = {"total": counts.sandboxes, "ready": counts.ready, "generic": counts.generic}
    return {"functions": functions, "sandboxes": sandboxes}


def _tenant_fields(
    ctx: ModelContext, counts: RuntimeCounts | None, previous: Mapping[str, Any]
) -> Object:
    if not ctx.spec.tenants:
        return {}
    keys = {tenant["name"]: tenant.get("keys") for tenant in previous.get("tenants", ())}
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


def _without_counters(status: Mapping[str, Any]) -> Object:
    """Return a status without counters and messages, which may contain counters."""
    conditions = [
        {key: value for key, value in condition.items() if key != "message"}
        for condition in status.get("conditions", ())
    ]
    throttled = ("functions", "sandboxes", "conditions")
    rest = {key: value for key, value in status.items() if key not in throttled}
    return {**rest, "conditions": conditions}
