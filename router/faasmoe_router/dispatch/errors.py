"""What can go wrong with a call to a function. None of it leaves the dispatcher."""

from __future__ import annotations


class CallError(Exception):
    """A call that gave no answer: the connection, the sandbox or its answer failed."""


class CannotConnect(CallError):
    """Nothing accepts connections at the address."""


class NotYetThere(CannotConnect):
    """Nothing accepts connections at the address, and nothing ever has: it may be starting."""


class TooSlow(CallError):
    """The call took longer than it may; nothing else is known to be wrong."""


class Overtaken(CallError):
    """The same call, made later at another replica, was answered first."""


class Ejected(CallError):
    """Every address of the function is ejected, so that the call was not made."""


class Refused(CallError):
    """The sandbox answered with another status than 200."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"status {status}: {reason}")
        self.status = status
