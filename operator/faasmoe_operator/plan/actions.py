"""What is to be done with sandboxes, and a machine-stable reason for each action."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ActionReason(StrEnum):
    """Why an action is planned; stable, for metrics and tests."""

    DEMAND = "Demand"
    """A function has fewer replicas than it should have."""
    WARM_POOL = "WarmPool"
    """The pool of generic sandboxes is to be filled."""
    TEMPLATE_CHANGED = "TemplateChanged"
    """The sandbox is of an old template, or replaces one that is."""
    SURPLUS = "Surplus"
    """A function has more replicas than it should have."""
    NOT_PLANNED = "NotPlanned"
    """The function is none of this plan's."""
    MEMORY = "Memory"
    """The function makes room for one that was used more lately."""
    IDLE = "Idle"
    """A generic sandbox beyond the pool."""
    FAILED = "Failed"
    """The sandbox cannot be used any more."""
    START_TIMED_OUT = "StartTimedOut"
    """The sandbox was not ready before its deadline."""


@dataclass(frozen=True, slots=True)
class Create:
    """Create `count` generic sandboxes from the current template."""

    count: int
    reason: ActionReason


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a sandbox."""

    sandbox: str
    reason: ActionReason


@dataclass(frozen=True, slots=True)
class Attach:
    """Attach a function to a sandbox that is ready."""

    sandbox: str
    function: str
    reason: ActionReason


@dataclass(frozen=True, slots=True)
class Detach:
    """Detach a function from a sandbox."""

    sandbox: str
    function: str
    reason: ActionReason


Action = Create | Delete | Attach | Detach
