"""What can be said of one part of a model. Pure.

Conditions of a MoEModel: every known one, always, and one that sums them up. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from faasmoe_operator.kube.types import Object

ConditionStatus = Literal["True", "False", "Unknown"]
MAX_MESSAGE_CHARS = 1024


@dataclass(frozen=True, slots=True)
class ConditionState:
    """The state of a condition.

    Attributes:
        status: True, False, or Unknown while that is not yet settled.
        reason: CamelCase, machine-stable.
        message: for people: what is so, and what to do if it should not be.
    """

    status: ConditionStatus
    reason: str
    message: str


def condition_true(reason: str, message: str) -> ConditionState:
    """Return that all is well."""
    return ConditionState("True", reason, message)


def condition_false(reason: str, message: str) -> ConditionState:
    """Return that something is wrong, which somebody may have to mend."""
    truncated = message if len(message) <= MAX_MESSAGE_CHARS else f"{message[:MAX_MESSAGE_CHARS]}…"
    return ConditionState("False", reason, truncated)


def condition_unknown(reason: str, message: str) -> ConditionState:
    """Return that it is under way."""
    return ConditionState("Unknown", reason, message)


READY = "Ready"
STORE_READY = "StoreReady"
ROUTER_READY = "RouterReady"
FUNCTIONS_READY = "FunctionsReady"
ACTIVE = "Active"
TENANTS_READY = "TenantsReady"
READY_DEPENDENTS = (STORE_READY, ROUTER_READY, FUNCTIONS_READY, TENANTS_READY)
"""What a model must have to be ready, in the order in which they come about."""


@dataclass(frozen=True, slots=True)
class ConditionStates:
    """The state of each condition but Ready.

    Attributes:
        store: of the store.
        router: of the routers.
        functions: of the expert functions.
        tenants: of the tenants' keys.
        active: whether any function has a replica.
    """

    store: ConditionState
    router: ConditionState
    functions: ConditionState
    tenants: ConditionState
    active: ConditionState

    @classmethod
    def uniform(cls, state: ConditionState) -> ConditionStates:
        """Return the same for every condition."""
        return cls(state, state, state, state, state)

    def by_type(self) -> dict[str, ConditionState]:
        """Return them by the condition's type, without Ready."""
        return {
            STORE_READY: self.store,
            ROUTER_READY: self.router,
            FUNCTIONS_READY: self.functions,
            ACTIVE: self.active,
            TENANTS_READY: self.tenants,
        }


def summarize_ready(states: ConditionStates) -> ConditionState:
    """Return the state of Ready: what is wrong, else what is under way, else that all is well."""
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
    """Return the list for the status; times change only where a status flips.

    Args:
        verdicts: state by type.
        before: the conditions that the object has.
        generation: of the spec that they are about.
        now: the time, as RFC 3339 writes it.
    """
    previous_by_type = {str(condition.get("type")): condition for condition in previous}
    return [
        _build_condition(kind, verdict, previous_by_type.get(kind), generation=generation, now=now)
        for kind, verdict in states.items()
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
