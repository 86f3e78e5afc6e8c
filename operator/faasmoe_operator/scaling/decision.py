"""What the autoscaler says: a number of replicas and a machine-stable reason for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class Reason(StrEnum):
    """Why a function should have that many replicas; stable, for metrics and tests."""

    STABLE = "Stable"
    """The stable window's load over the target."""
    PANIC = "Panic"
    """The panic window's load is over the threshold: up at once."""
    PANIC_HOLD = "PanicHold"
    """In panic the replicas never go down."""
    SCALE_UP_RATE = "ScaleUpRate"
    """More is wanted than one decision may add."""
    SCALE_DOWN_RATE = "ScaleDownRate"
    """Less is wanted than one decision may leave."""
    ACTIVATION_SCALE = "ActivationScale"
    """Once above zero, at least the activation scale."""
    SCALE_DOWN_DELAY = "ScaleDownDelay"
    """A higher wish is not old enough to be given up."""
    MIN_SCALE = "MinScale"
    MAX_SCALE = "MaxScale"
    INITIAL_SCALE = "InitialScale"
    """The first deployment has not been ready once."""
    NO_DATA = "NoData"
    """Nobody reported for a whole window: what is there is kept."""
    ACTIVATED = "Activated"
    """A call came to a function at zero."""
    ALREADY_ACTIVE = "AlreadyActive"
    """A wake that changes nothing: a replica is there or on its way."""
    ACTIVATING = "Activating"
    """No load, but a replica that is starting is never reaped."""
    TIMED_OUT = "TimedOut"
    """No replica became ready before the progress deadline, and nobody waits for it."""
    STABLE_WINDOW = "StableWindow"
    """No load, but active for less than a stable window."""
    GRACE_PERIOD = "GracePeriod"
    """No load for a stable window; the last replica stays for the grace or retention period."""
    NO_TRAFFIC = "NoTraffic"
    """At zero, as nobody calls."""
    SCALE_TO_ZERO_DISABLED = "ScaleToZeroDisabled"


@dataclass(frozen=True, slots=True)
class Decision:
    """The replicas that a function should have from now on.

    Attributes:
        desired: the number of replicas, 0 or more.
        reason: what decided the number.
    """

    desired: int
    reason: Reason

    def overridden_by(self, desired: int, reason: Reason) -> Decision:
        """Return this decision overruled by another number; itself if the number is the same."""
        return self if desired == self.desired else replace(self, desired=desired, reason=reason)
