"""A call to a sandbox, how long it may take, and who decides what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from faasmoe_expert.wire.checksum import Buffer
from faasmoe_router.dispatch.errors import CallError

Take = Callable[[int, memoryview], None]
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

    def at(self, address: str) -> Call:
        """Return the same call for another address."""
        return Call(address, self.function_id, self.frame)


@dataclass(frozen=True, slots=True)
class Timeouts:
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


class Course(Protocol):
    """What becomes of calls that fail or take long; asked by the round, in its thread."""

    def patience_s(self, position: int, call: Call) -> tuple[float, float]:
        """Return after how many seconds a call is hedged, and after how many it is too slow."""

    def hedge(self, position: int, call: Call) -> Call | None:
        """Return a call to make beside one that takes long; asked once."""

    def is_too_slow(self, position: int, call: Call) -> bool:
        """Return whether to give a call up that takes much too long; asked once."""

    def another(self, position: int, call: Call, error: CallError) -> Call | None:
        """Return a call to make instead of one that failed."""

    def answered(self, position: int, call: Call, took_s: float) -> None:
        """Take note of a good answer."""

    def failed(self, position: int, call: Call, error: CallError) -> None:
        """Take note of a call that failed, or that another one was faster than."""
