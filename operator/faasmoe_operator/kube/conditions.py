"""Conditions of a MoEModel.

Every known condition is always present; Ready summarizes the others. Pure functions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from faasmoe_operator.kube.types import Object

ConditionStatus = Literal["True", "False", "Unknown"]
MAX_MESSAGE_CHARS = 1024
READY = "Ready"
STORE_READY = "StoreReady"
ROUTER_READY = "RouterReady"
FUNCTIONS_READY = "FunctionsReady"
ACTIVE = "Active"
TENANTS_READY = "TenantsReady"
READY_DEPENDENTS = (STORE_READY, ROUTER_READY, FUNCTIONS_READY)
"""The conditions that Ready depends on, in the order in which they become True.

A tenant without a key keeps nobody else from being served, so TenantsReady is none of them.
"""


@dataclass(frozen=True, slots=True)
class ConditionState:
    """The state of one condition.

    Attributes:
        status: True, False, or Unknown while it is in progress.
        reason: CamelCase word, stable for machines.
        message: the state in words, and what to do about it if it is False.
    """

    status: ConditionStatus
    reason: str
    message: str


def condition_true(reason: str, message: str) -> ConditionState:
    """Return the state True."""
    return ConditionState("True", reason, _truncated(message))


def condition_false(reason: str, message: str) -> ConditionState:
    """Return the state False, which may need someone to act."""
    return ConditionState("False", reason, _truncated(message))


def condition_unknown(reason: str, message: str) -> ConditionState:
    """Return the state Unknown, for what is in progress."""
    return ConditionState("Unknown", reason, _truncated(message))


def _truncated(message: str) -> str:
    return message if len(message) <= MAX_MESSAGE_CHARS else f"{message[:MAX_MESSAGE_CHARS]}…"


@dataclass(frozen=True, slots=True)
class ConditionStates:
    """The state of each condition other than Ready.

    Attributes:
        store: StoreReady.
        router: RouterReady.
        functions: FunctionsReady.
        tenants: TenantsReady.
        active: Active.
    """

    store: ConditionState
    router: ConditionState
    functions: ConditionState
    tenants: ConditionState
    active: ConditionState

    @classmethod
    def uniform(cls, state: ConditionState) -> ConditionStates:
        """Return the same state for every condition."""
        return cls(state, state, state, state, state)

    def by_type(self) -> dict[str, ConditionState]:
        """Return the states by condition type, without Ready."""
        return {
            STORE_READY: self.store,
            ROUTER_READY: self.router,
            FUNCTIONS_READY: self.functions,
            ACTIVE: self.active,
            TENANTS_READY: self.tenants,
        }


def summarize_ready(states: ConditionStates) -> ConditionState:
    """Return the state of Ready: the first one that is False, else the first Unknown, else True."""
    by_type = states.by_type()
    for status, make in (("False", condition_false), ("Unknown", condition_unknown)):
        for condition_type in READY_DEPENDENTS:
            if by_type[condition_type].status == status:
                return make(
                    by_type[condition_type].reason,
                    f"{condition_type}: {by_type[condition_type].message}",
                )
    return condition_true("Ready", "the model is ready")


def build_conditions(
    states: Mapping[str, ConditionState], previous: Iterable[Object], *, generation: int, now: str
) -> list[Object]:
    """Return `status.conditions`; lastTransitionTime changes only with the status.

    Args:
        states: state by condition type.
        previous: the object's current conditions.
        generation: generation of the spec that the states describe.
        now: the time in RFC 3339 format.
    """
    previous_by_type = {str(condition.get("type")): condition for condition in previous}
    return [
        _build_condition(type_, state, previous_by_type.get(type_), generation=generation, now=now)
        for type_, state in states.items()
    ]


def _build_condition(
    condition_type: str,
    state: ConditionState,
    previous: Object | None,
    *,
    generation: int,
    now: str,
) -> Object:
    is_transition = previous is None or previous.get("status") != state.status
    transition_time = (
        now if previous is None or is_transition else previous.get("lastTransitionTime", now)
    )
    return {
        "type": condition_type,
        "status": state.status,
        "observedGeneration": generation,
        "lastTransitionTime": transition_time,
        "reason": state.reason,
        "message": state.message,
    }
