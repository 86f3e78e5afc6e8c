"""What can go wrong with a call to a function. None of it leaves the dispatcher.

A call to a sandbox, how long it may take, and who decides what becomes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from faasmoe_contracts.wire import Buffer


class CallError(Exception):
    """A call that gave no answer: the connection, the sandbox or its answer failed."""


class ConnectError(CallError):
    """Nothing accepts connections at the address."""


class EndpointStarting(ConnectError):
    """Nothing accepts connections at the address, and nothing ever has: it may be starting."""


class CallTimeout(CallError):
    """The call took longer than it may; nothing else is known to be wrong."""


class LostHedge(CallError):
    """The same call, made later at another replica, was answered first."""


class NoHealthyEndpoint(CallError):
    """Every address of the function is ejected, so that the call was not made."""


class StatusError(CallError):
    """The sandbox answered with another status than 200."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"status {status}: {reason}")
        self.status = status


ResponseHandler = Callable[[int, memoryview], None]
"""Gets the position and the body of an answer, which is valid during the call."""


@dataclass(frozen=True, slots=True)
class Call:
    """One frame for one function at one address (host:port)."""

    address: str
    function_id: str
    frame: Sequence[Buffer]

    @property
    def size_bytes(self) -> int:
        """Bytes of the frame."""
        return sum(memoryview(part).nbytes for part in self.frame)

    def with_address(self, address: str) -> Call:
        """Return the same call for another address."""
        return Call(address, self.function_id, self.frame)


@dataclass(frozen=True, slots=True)
class DispatchTimeouts:
    """How long things may take, in seconds; each is part of the next one.

    Attributes:
        connect_timeout_s: until a sandbox has accepted a new connection.
        call_timeout_s: until a call's answer is whole.
        layer_timeout_s: until all of a layer's parts are there or are begun to be computed here,
            with all that is tried and waited for.
    """

    connect_timeout_s: float = 1.0
    call_timeout_s: float = 10.0
    layer_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        """Refuse deadlines that do not nest."""
        if not 0 < self.connect_timeout_s <= self.call_timeout_s <= self.layer_timeout_s:
            raise ValueError(
                f"timeouts: got connect {self.connect_timeout_s:g} s, call "
                f"{self.call_timeout_s:g} s, layer {self.layer_timeout_s:g} s, expected more than "
                "0 and each at most the next one"
            )


class RetryPolicy(Protocol):
    """What becomes of calls that fail or take long; asked by the round, in its thread."""

    def latency_thresholds_s(self, position: int, call: Call) -> tuple[float, float]:
        """Return after how many seconds a call is hedged, and after how many it is too slow."""

    def hedge(self, position: int, call: Call) -> Call | None:
        """Return a call to make beside one that takes long; asked once."""

    def should_abandon(self, position: int, call: Call) -> bool:
        """Return whether to give a call up that takes much too long; asked once."""

    def next_attempt(self, position: int, call: Call, error: CallError) -> Call | None:
        """Return a call to make instead of one that failed."""

    def on_response(self, position: int, call: Call, elapsed_s: float) -> None:
        """Take note of a good answer."""

    def on_failure(self, position: int, call: Call, error: CallError) -> None:
        """Take note of a call that failed, or that another one was faster than."""
