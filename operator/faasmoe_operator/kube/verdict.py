"""What can be said of one part of a model. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Truth = Literal["True", "False", "Unknown"]
MAX_MESSAGE_CHARS = 1024


@dataclass(frozen=True, slots=True)
class Verdict:
    """The state of a condition.

    Attributes:
        status: True, False, or Unknown while that is not yet settled.
        reason: CamelCase, machine-stable.
        message: for people: what is so, and what to do if it should not be.
    """

    status: Truth
    reason: str
    message: str


def good(reason: str, message: str) -> Verdict:
    """Return that all is well."""
    return Verdict("True", reason, message)


def bad(reason: str, message: str) -> Verdict:
    """Return that something is wrong, which somebody may have to mend."""
    text = message if len(message) <= MAX_MESSAGE_CHARS else f"{message[:MAX_MESSAGE_CHARS]}…"
    return Verdict("False", reason, text)


def pending(reason: str, message: str) -> Verdict:
    """Return that it is under way."""
    return Verdict("Unknown", reason, message)
