"""One fan-out: each of its calls was answered or has failed when it ends.

What is tried instead of a call that failed, or beside one that takes long, is not known here: a
`Course` says so.
"""

from __future__ import annotations

import math
import select
import time
from collections.abc import Callable, Mapping, Sequence

from faasmoe_router.dispatch.calls import Call, Course, Take, Timeouts
from faasmoe_router.dispatch.connection import Connection
from faasmoe_router.dispatch.cores import left_by
from faasmoe_router.dispatch.errors import CallError, CannotConnect, Overtaken, Refused, TooSlow
from faasmoe_router.dispatch.flight import Flight
from faasmoe_router.dispatch.pool import ConnectionPool

SENDING_PAUSE_S = 0.005  # a sandbox that takes no byte for so long is busy with something else


class Round:
    """One fan-out: its calls in flight and its errors.

    Args:
        pool: where connections come from, and go when they are answered.
        take: gets each answer. A CallError that it raises counts as the call's failure.
        timeouts: bounds of each call.
        course: what becomes of calls that fail or take long; None: they are errors.
        by_s: when to give up all calls, on the monotonic clock.
    """

    def __init__(
        self,
        pool: ConnectionPool,
        take: Take,
        timeouts: Timeouts,
        course: Course | None,
        by_s: float,
    ) -> None:
        self._pool = pool
        self._take = take
        self._timeouts = timeouts
        self._course = course
        self._by_s = by_s
        self._open: dict[int, Flight] = {}  # by file descriptor
        self._errors: dict[int, CallError] = {}
        self._poll = select.poll()

    def run(
        self,
        calls: Mapping[int, Call] | Sequence[Call],
        meanwhile: Callable[[], None] | None,
    ) -> dict[int, CallError]:
        """Make all calls, and other work while they are away; return errors by position."""
        items = calls.items() if isinstance(calls, Mapping) else enumerate(calls)
        try:
            for position, call in items:
                self._begin(position, call, fresh=False)
            if meanwhile is not None:
                self._send_rest()
                with left_by(sum(f.connection.is_near for f in self._open.values())):
                    meanwhile()
                self._advance_all(0.0)  # what has come meanwhile is not late
            while self._open:
                self._advance_all(self._time_left())
            return self._errors
        finally:  # what is left if `take` raised
            for flight in self._open.values():
                flight.connection.close()

    def _begin(self, position: int, call: Call, *, fresh: bool) -> None:
        try:
            connection = self._pool.connection(call.address, fresh=fresh)
        except CallError as error:
            self._fail(position, call, error)
            return
        try:
            connection.start(self._pool.head(call), call.frame)
        except CallError as error:
            self._lose(Flight(position, call, connection, 0.0), error)
            return
        self._open[connection.fileno()] = self._flight(position, call, connection)
        self._poll.register(connection, connection.events)

    def _flight(self, position: int, call: Call, connection: Connection) -> Flight:
        now_s = time.monotonic()
        flight = Flight(position, call, connection, now_s)
        flight.connect_by_s = now_s + self._timeouts.connect_timeout_s
        flight.end_by_s = min(self._by_s, now_s + self._timeouts.call_timeout_s)
        if self._course is not None:
            hedge_s, slow_s = self._course.patience_s(position, call)
            flight.hedge_s, flight.slow_s = now_s + hedge_s, now_s + slow_s
        return flight

    def _send_rest(self) -> None:
        """Send what the sockets did not take at once, as long as the sandboxes read."""
        while any(flight.connection.events & select.POLLOUT for flight in self._open.values()):
            if not self._advance_all(SENDING_PAUSE_S):
                return

    def _advance_all(self, timeout_s: float) -> bool:
        """Go on with the calls that can; return whether there was one in time."""
        ready = self._poll.poll(timeout_s * 1000)
        for fd, events in ready:
            if fd in self._open:  # it may have been overtaken since
                self._advance(fd, events)
        return bool(ready)

    def _advance(self, fd: int, events: int) -> None:
        flight = self._open[fd]
        connection = flight.connection
        try:
            # An answer first: one that came before the whole call was sent tells why.
            whole = bool(events & ~select.POLLOUT) and connection.receive()
            if not whole:
                if events & select.POLLOUT:
                    connection.send()
                    self._poll.modify(fd, connection.events)
                return
        except CallError as error:
            self._finish(fd)
            self._lose(flight, error)
            return
        self._finish(fd)
        self._deliver(flight)

    def _deliver(self, flight: Flight) -> None:
        connection = flight.connection
        try:
            self._take(flight.position, connection.answer())
        except Refused as error:
            self._pool.keep(connection)
            self._fail(flight.position, flight.call, error)
            return
        except CallError as error:
            connection.close()
            self._fail(flight.position, flight.call, error)
            return
        except BaseException:
            connection.close()
            raise
        self._pool.keep(connection)
        if self._course is not None:
            took_s = time.monotonic() - flight.begun_s
            self._course.answered(flight.position, flight.call, took_s)
            if flight.is_paired:
                self._drop_others(flight)

    def _lose(self, flight: Flight, error: CallError) -> None:
        """Go on after a connection that broke."""
        flight.connection.close()
        if flight.connection.is_stale:
            self._begin(flight.position, flight.call, fresh=True)
        else:
            self._fail(flight.position, flight.call, error)

    def _fail(self, position: int, call: Call, error: CallError) -> None:
        if self._course is None:
            self._errors[position] = error
            return
        self._course.failed(position, call, error)
        if any(flight.position == position for flight in self._open.values()):
            return  # its hedge, or what it hedged, may still answer
        other = self._course.another(position, call, error)
        if other is None:
            self._errors[position] = error
        else:
            self._begin(position, other, fresh=False)

    def _drop_others(self, winner: Flight) -> None:
        """Give up the call that was overtaken by another one for the same part."""
        assert self._course is not None
        for fd, flight in list(self._open.items()):
            if flight.position == winner.position:
                self._finish(fd)
                flight.connection.close()
                late = Overtaken(f"{flight.call.address}: {winner.call.address} was faster")
                self._course.failed(flight.position, flight.call, late)

    def _finish(self, fd: int) -> None:
        # Before the socket is closed: a new connection may get the same descriptor.
        del self._open[fd]
        self._poll.unregister(fd)

    def _time_left(self) -> float:
        """Hedge and give up the calls whose time has come; return how long to wait for others."""
        now_s, next_s = time.monotonic(), math.inf
        for fd, flight in list(self._open.items()):
            due_s = flight.due_s
            if due_s > now_s:
                next_s = min(next_s, due_s)
                continue
            self._take_time(fd, flight, now_s)
            next_s = now_s  # look again: there may be another call now
        return max(0.0, next_s - now_s) if self._open else 0.0

    def _take_time(self, fd: int, flight: Flight, now_s: float) -> None:
        """Do what is due for one call."""
        position, call = flight.position, flight.call
        if flight.ends_by_s <= now_s:
            self._give_up(fd, flight)
        elif flight.slow_s <= now_s:
            flight.slow_s = math.inf
            assert self._course is not None
            if self._course.is_too_slow(position, call):
                self._give_up(fd, flight)
        else:
            flight.hedge_s = math.inf
            assert self._course is not None
            other = self._course.hedge(position, call)
            if other is not None:
                flight.is_paired = True
                self._begin_beside(position, other)

    def _begin_beside(self, position: int, call: Call) -> None:
        self._begin(position, call, fresh=False)
        for flight in self._open.values():
            if flight.position == position:
                flight.is_paired, flight.hedge_s = True, math.inf

    def _give_up(self, fd: int, flight: Flight) -> None:
        connection = flight.connection
        self._finish(fd)
        connection.close()
        error: CallError = TooSlow(f"{connection.address}: no answer in time")
        if not connection.connected:
            error = CannotConnect(f"{connection.address}: no connection in time")
        self._fail(flight.position, flight.call, error)
