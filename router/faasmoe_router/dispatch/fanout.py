"""Calls to several sandboxes at once, from one thread."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from faasmoe_router.dispatch.calls import Call, Course, Take, Timeouts
from faasmoe_router.dispatch.errors import CallError
from faasmoe_router.dispatch.pool import ConnectionPool
from faasmoe_router.dispatch.round import Round
from faasmoe_router.dispatch.sharing import SHARED_FRAME_BYTES


class Fanout:
    """Keep-alive connections to sandboxes, and rounds of parallel calls over them.

    Belongs to one thread, but for `retain` and `rest`. A call that fails on a connection that was
    used before, without a byte of an answer, is made once more on a new one: the sandbox may have
    closed it while idle, and calls are pure.

    Args:
        token: bearer token of the sandboxes.
        timeouts: bounds of a round.
        socket_dir: where sandboxes of this machine have Unix sockets; None for TCP alone.
        shared_bytes: frames of so many bytes and more are shared with those, not sent.
    """

    def __init__(
        self,
        *,
        token: str = "",
        timeouts: Timeouts | None = None,
        socket_dir: Path | None = None,
        shared_bytes: int = SHARED_FRAME_BYTES,
    ) -> None:
        self._pool = ConnectionPool(token=token, socket_dir=socket_dir, shared_bytes=shared_bytes)
        self._timeouts = timeouts or Timeouts()

    def run(
        self,
        calls: Mapping[int, Call] | Sequence[Call],
        take: Take,
        *,
        meanwhile: Callable[[], None] | None = None,
        course: Course | None = None,
        by_s: float = math.inf,
    ) -> dict[int, CallError]:
        """Make all calls; return the errors of those that failed, by position.

        Args:
            calls: the calls, sent in order, answered in any order.
            take: gets each answer's position and body; the body is valid during the call. A
                CallError that it raises counts as the call's failure.
            meanwhile: work to do once while the calls are away.
            course: what becomes of calls that fail or take long; by default they are errors.
            by_s: when to give up all calls, on the monotonic clock.
        """
        return Round(self._pool, take, self._timeouts, course, by_s).run(calls, meanwhile)

    def retain(self, addresses: Collection[str]) -> None:
        """Close the connections to all other addresses, those in use once they are answered.

        Their sandboxes are gone. May be called from any thread.
        """
        self._pool.retain(addresses)

    def rest(self) -> None:
        """Give back memory that idle connections keep; from any thread."""
        self._pool.rest()

    def close(self) -> None:
        """Close all idle connections."""
        self._pool.close()
