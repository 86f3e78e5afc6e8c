"""Scaling one function from and to zero.

    Inactive ─activate─▶ Activating ──ready──▶ Active ──window without load──▶ Draining
        ▲                  │                   ▲                                │ │
        │                  └─ TimedOut ─▶ (Inactive)      load or activation ───┘ │
        └───────────────────────────── grace or retention period ─────────────────┘

Scaling up from zero needs no decision of the autoscaler: an activation request suffices. Scaling to
zero needs a stable window without load since the function became active, and then the longer of the
grace and retention periods. A starting replica is never removed, unless the progress deadline has
passed and no request waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from faasmoe_operator.scaling.decision import Decision, Reason
from faasmoe_operator.scaling.settings import ScalingSettings


class Phase(Enum):
    """The activation phase of a function."""

    INACTIVE = "Inactive"
    ACTIVATING = "Activating"
    ACTIVE = "Active"
    DRAINING = "Draining"


@dataclass(frozen=True, slots=True)
class ActivationState:
    """A phase and the time at which it began."""

    phase: Phase
    since: float

    def transition(self, phase: Phase, *, now: float) -> ActivationState:
        """Return the state in a phase; itself if it is in that phase already."""
        return self if phase is self.phase else ActivationState(phase, now)

    def elapsed_s(self, now: float) -> float:
        """Return the seconds since the phase began."""
        return now - self.since


def initial_activation(*, replicas: int, ready: int, now: float) -> ActivationState:
    """Return the state of a function first observed with `replicas`, of which `ready` are ready."""
    if replicas == 0:
        return ActivationState(Phase.INACTIVE, now)
    return ActivationState(Phase.ACTIVE if ready else Phase.ACTIVATING, now)


def activate(activation: ActivationState, *, now: float) -> ActivationState:
    """Return the state after an activation request or load."""
    if activation.phase is Phase.INACTIVE:
        return activation.transition(Phase.ACTIVATING, now=now)
    if activation.phase is Phase.DRAINING:
        return activation.transition(Phase.ACTIVE, now=now)
    return activation


def observe_ready(activation: ActivationState, *, ready: int, now: float) -> ActivationState:
    """Return the state after an observation of the number of ready replicas."""
    if activation.phase is Phase.ACTIVATING and ready > 0:
        return activation.transition(Phase.ACTIVE, now=now)
    if activation.phase is Phase.ACTIVE and ready == 0:
        return activation.transition(Phase.ACTIVATING, now=now)
    return activation


def apply_scale_to_zero(
    settings: ScalingSettings,
    activation: ActivationState,
    *,
    kpa_decision: Decision,
    last_desired: int,
    now: float,
) -> tuple[Decision, ActivationState]:
    """Return the decision with the rules of scaling to zero applied, and the next state.

    Args:
        settings: the function's settings.
        activation: the current state.
        kpa_decision: the autoscaler's decision.
        last_desired: replicas of the last decision, which are kept while activating.
        now: current time in seconds.
    """
    if not settings.enable_scale_to_zero:
        kpa_decision = kpa_decision.overridden_by(
            max(1, kpa_decision.desired), Reason.SCALE_TO_ZERO_DISABLED
        )
    if _has_timed_out(settings, activation, kpa_decision=kpa_decision, now=now):
        return Decision(0, Reason.TIMED_OUT), activation.transition(Phase.INACTIVE, now=now)
    if kpa_decision.reason is Reason.NO_DATA and kpa_decision.desired > 0:
        return kpa_decision, activation
    if kpa_decision.desired > 0:
        return kpa_decision, activate(activation, now=now)
    return _scale_toward_zero(settings, activation, last_desired=last_desired, now=now)


def _has_timed_out(
    settings: ScalingSettings, activation: ActivationState, *, kpa_decision: Decision, now: float
) -> bool:
    """Return whether the progress deadline has passed and no request is known to wait."""
    can_be_zero = settings.min_scale == 0 and settings.enable_scale_to_zero
    no_demand = kpa_decision.desired == 0 or (kpa_decision.reason is Reason.NO_DATA and can_be_zero)
    is_late = activation.elapsed_s(now) >= settings.progress_deadline_s
    return activation.phase is Phase.ACTIVATING and no_demand and is_late


def _scale_toward_zero(
    settings: ScalingSettings, activation: ActivationState, *, last_desired: int, now: float
) -> tuple[Decision, ActivationState]:
    if activation.phase is Phase.ACTIVATING:
        return Decision(max(1, last_desired), Reason.ACTIVATING), activation
    if activation.phase is Phase.ACTIVE:
        if activation.elapsed_s(now) < settings.window_s:
            return Decision(1, Reason.STABLE_WINDOW), activation
        activation = activation.transition(Phase.DRAINING, now=now)
    if activation.phase is Phase.DRAINING:
        if activation.elapsed_s(now) < settings.last_replica_retention_s:
            return Decision(1, Reason.GRACE_PERIOD), activation
        activation = activation.transition(Phase.INACTIVE, now=now)
    return Decision(0, Reason.NO_TRAFFIC), activation
