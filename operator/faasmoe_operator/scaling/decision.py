"""The autoscaler's decision: a number of replicas and a machine-readable reason."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class Reason(StrEnum):
    """Why a function should have that many replicas; a stable API of metrics and tests."""

    STABLE = "Stable"
    """The stable window's load, divided by the target."""
    PANIC = "Panic"
    """The panic window's load exceeds the threshold: scale up immediately."""
    PANIC_HOLD = "PanicHold"
    """No scale-down during panic."""
    SCALE_UP_RATE = "ScaleUpRate"
    """Limited by the maximum scale-up rate."""
    SCALE_DOWN_RATE = "ScaleDownRate"
    """Limited by the maximum scale-down rate."""
    ACTIVATION_SCALE = "ActivationScale"
    """At least the activation scale once above zero."""
    SCALE_DOWN_DELAY = "ScaleDownDelay"
    """A higher recommendation is younger than the scale-down delay."""
    MIN_SCALE = "MinScale"
    MAX_SCALE = "MaxScale"
    INITIAL_SCALE = "InitialScale"
    """The initial scale has not been ready once."""
    NO_DATA = "NoData"
    """No report for a whole window: keep the replicas."""
    ACTIVATED = "Activated"
    """An activation request for a function at zero."""
    ALREADY_ACTIVE = "AlreadyActive"
    """An activation request without effect: a replica is ready or starting."""
    ACTIVATING = "Activating"
    """No load, but a starting replica is never removed."""
    TIMED_OUT = "TimedOut"
    """No replica became ready before the progress deadline, and no request waits for one."""
    STABLE_WINDOW = "StableWindow"
    """No load, but active for less than a stable window."""
    GRACE_PERIOD = "GracePeriod"
    """No load for a stable window; the last replica stays for the grace or retention period."""
    NO_TRAFFIC = "NoTraffic"
    """At zero without load."""
    SCALE_TO_ZERO_DISABLED = "ScaleToZeroDisabled"


@dataclass(frozen=True, slots=True)
class Decision:
    """The desired replicas of a function.

    Attributes:
        desired: the number of replicas, 0 or more.
        reason: the rule that determined the number.
    """

    desired: int
    reason: Reason

    def overridden_by(self, desired: int, reason: Reason) -> Decision:
        """Return the decision with another number and reason; itself if the number is the same."""
        return self if desired == self.desired else replace(self, desired=desired, reason=reason)
