"""The way to zero and back, for one function.

    Inactive ──wake──▶ Activating ──ready──▶ Active ──window without load──▶ Draining
        ▲                  │                   ▲                                │ │
        │                  └─ TimedOut ─▶ (Inactive)      load or wake ─────────┘ │
        └───────────────────────────── grace or retention period ─────────────────┘

Going up needs no decision of the autoscaler: a wake suffices. Going down to zero needs a stable
window without load since the function became active, and then the longer of grace and retention
period. A replica that is starting is never reaped, unless the progress deadline has passed and
nobody waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from faasmoe_operator.scaling.decision import Decision, Reason
from faasmoe_operator.scaling.settings import ScalingSettings


class Phase(Enum):
    """Where a function is on its way to zero and back."""

    INACTIVE = "Inactive"
    ACTIVATING = "Activating"
    ACTIVE = "Active"
    DRAINING = "Draining"


@dataclass(frozen=True, slots=True)
class Activation:
    """A phase and the time when it began."""

    phase: Phase
    since: float

    def to(self, phase: Phase, *, now: float) -> Activation:
        """Return the activation in this phase; one that is in it already keeps its time."""
        return self if phase is self.phase else Activation(phase, now)

    def lasted(self, now: float) -> float:
        """Return for how many seconds the phase has lasted."""
        return now - self.since


def begun(*, replicas: int, ready: int, now: float) -> Activation:
    """Return the phase of a function that is first seen with these replicas, and these ready."""
    if replicas == 0:
        return Activation(Phase.INACTIVE, now)
    return Activation(Phase.ACTIVE if ready else Phase.ACTIVATING, now)


def woken(activation: Activation, *, now: float) -> Activation:
    """Return what a wake makes of it: zero begins to activate, what drains is active again."""
    if activation.phase is Phase.INACTIVE:
        return activation.to(Phase.ACTIVATING, now=now)
    if activation.phase is Phase.DRAINING:
        return activation.to(Phase.ACTIVE, now=now)
    return activation


def seen(activation: Activation, *, ready: int, now: float) -> Activation:
    """Return what the number of ready replicas makes of it."""
    if activation.phase is Phase.ACTIVATING and ready > 0:
        return activation.to(Phase.ACTIVE, now=now)
    if activation.phase is Phase.ACTIVE and ready == 0:
        return activation.to(Phase.ACTIVATING, now=now)
    return activation


def settle(
    settings: ScalingSettings, activation: Activation, *, wanted: Decision, held: int, now: float
) -> tuple[Decision, Activation]:
    """Return the decision once the way to zero is minded, and the next phase.

    Args:
        settings: the function's settings.
        activation: the phase until now.
        wanted: what the autoscaler decided.
        held: the replicas decided last, which stay while the function is activating.
        now: the time.
    """
    if not settings.enable_scale_to_zero:
        wanted = wanted.but(max(1, wanted.desired), Reason.SCALE_TO_ZERO_DISABLED)
    if _gives_up(settings, activation, wanted=wanted, now=now):
        return Decision(0, Reason.TIMED_OUT), activation.to(Phase.INACTIVE, now=now)
    if wanted.reason is Reason.NO_DATA and wanted.desired > 0:
        return wanted, activation
    if wanted.desired > 0:
        return wanted, woken(activation, now=now)
    return _toward_zero(settings, activation, held=held, now=now)


def _gives_up(
    settings: ScalingSettings, activation: Activation, *, wanted: Decision, now: float
) -> bool:
    """Return whether the activation has taken too long and nobody is known to wait for it."""
    may_be_zero = settings.min_scale == 0 and settings.enable_scale_to_zero
    nobody_waits = wanted.desired == 0 or (wanted.reason is Reason.NO_DATA and may_be_zero)
    too_long = activation.lasted(now) >= settings.progress_deadline_s
    return activation.phase is Phase.ACTIVATING and nobody_waits and too_long


def _toward_zero(
    settings: ScalingSettings, activation: Activation, *, held: int, now: float
) -> tuple[Decision, Activation]:
    if activation.phase is Phase.ACTIVATING:
        return Decision(max(1, held), Reason.ACTIVATING), activation
    if activation.phase is Phase.ACTIVE:
        if activation.lasted(now) < settings.window_s:
            return Decision(1, Reason.STABLE_WINDOW), activation
        activation = activation.to(Phase.DRAINING, now=now)
    if activation.phase is Phase.DRAINING:
        if activation.lasted(now) < settings.last_replica_stays_s:
            return Decision(1, Reason.GRACE_PERIOD), activation
        activation = activation.to(Phase.INACTIVE, now=now)
    return Decision(0, Reason.NO_TRAFFIC), activation
