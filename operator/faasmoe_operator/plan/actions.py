"""Planned actions on sandboxes, each with a machine-readable reason."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ActionReason(StrEnum):
    """Why an action is planned; a stable API of metrics and tests."""

    DEMAND = "Demand"
    """A function has fewer replicas than desired."""
    WARM_POOL = "WarmPool"
    """The warm pool has fewer sandboxes than desired."""
    TEMPLATE_CHANGED = "TemplateChanged"
    """The sandbox has an outdated template, or replaces one that has."""
    SURPLUS = "Surplus"
    """A function has more replicas than desired."""
    NOT_PLANNED = "NotPlanned"
    """The plan has no such function."""
    MEMORY = "Memory"
    """The function is evicted for one that was used more recently, or all of a sandbox are."""
    IDLE = "Idle"
    """The sandbox is empty and exceeds the warm pool."""
    FAILED = "Failed"
    """The sandbox has failed."""
    START_TIMED_OUT = "StartTimedOut"
    """The sandbox was not ready before the start deadline."""


@dataclass(frozen=True, slots=True)
class Create:
    """Create `count` empty sandboxes from the current template."""

    count: int
    reason: ActionReason


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a sandbox."""

    sandbox: str
    reason: ActionReason


@dataclass(frozen=True, slots=True)
class Attach:
    """Attach a function to a ready sandbox."""

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
