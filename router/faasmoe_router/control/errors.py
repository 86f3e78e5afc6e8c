"""What can go wrong with the control plane. None of it ends the router.

ControlError
├── Unreachable   it is away, or it cut or stalled the call
├── Rejected      it answered with another status than success
└── Garbage       it sent what the contract does not have
"""

from __future__ import annotations


class ControlError(Exception):
    """A call to the control plane that failed."""


class Unreachable(ControlError):
    """The control plane is away, or it cut or stalled the call."""


class Rejected(ControlError):
    """The control plane answered with another status than success."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"status {status}: {reason}")
        self.status = status


class Garbage(ControlError):
    """The control plane sent what the contract does not have; the message names the field."""
