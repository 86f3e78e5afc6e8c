"""Calls to several sandboxes at once, from one thread.

A round ends when each of its calls was answered or has failed. What is tried instead of a call that
failed, or beside one that takes long, is not known here: a `Course` says so.
"""

from __future__ import annotations

import math
import select
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from faasmoe_expert.wire.checksum import Buffer
from faasmoe_router.dispatch.connection import Connection
from faasmoe_router.dispatch.errors import CallError, CannotConnect, Overtaken, Refused, TooSlow

MAX_IDLE_PER_ADDRESS = 8
SENDING_PAUSE_S = 0.005  # a sandbox that takes no byte for so long is busy with something else

Take = Callable[[int, memoryview], None]


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


class Fanout:
    """Keep-alive connections to sandboxes, and rounds of parallel calls over them.

    Belongs to one thread, but for `retain`. A call that fails on a connection that was used before,
    without a byte of an answer, is made once more on a new one: the sandbox may have closed it
    while idle, and calls are pure.

    Args:
        token: bearer token of the sandboxes.
        timeouts: bounds of a round.
        socket_dir: where sandboxes of this machine have Unix sockets; None for TCP alone.
    """

    def __init__(
        self,
        *,
        token: str = "",
        timeouts: Timeouts | None = None,
        socket_dir: Path | None = None,
    ) -> None:
        self._authorization = f"authorization: Bearer {token}\r\n" if token else ""
        self._timeouts = timeouts or Timeouts()
        self._socket_dir = socket_dir
        self._idle: dict[str, list[Connection]] = {}
        self._known: Collection[str] | None = None  # None: every address
        self._lock = threading.Lock()  # of the two above

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
        return _Round(self, take, self._timeouts, course, by_s).run(calls, meanwhile)

    def connection(self, address: str, *, fresh: bool) -> Connection:
        """Return an idle connection, or a new one; raises CallError."""
        if not fresh:
            with self._lock:
                if idle := self._idle.get(address):
                    return idle.pop()
        return Connection(address, socket_dir=self._socket_dir)

    def head(self, call: Call) -> bytes:
        """Return the head of a call's HTTP request."""
        return (
            f"POST /v1/functions/{call.function_id} HTTP/1.1\r\nhost: {call.address}\r\n"
            f"{self._authorization}content-length: {call.size_bytes}\r\n\r\n"
        ).encode()

    def keep(self, connection: Connection) -> None:
        """Take a connection back whose answer was read."""
        address = connection.address
        with self._lock:
            is_known = self._known is None or address in self._known
            if is_known and connection.is_reusable:
                idle = self._idle.setdefault(address, [])
                if len(idle) < MAX_IDLE_PER_ADDRESS:
                    connection.rest()
                    idle.append(connection)
                    return
        connection.close()

    def retain(self, addresses: Collection[str]) -> None:
        """Close the connections to all other addresses, those in use once they are answered.

        Their sandboxes are gone. May be called from any thread.
        """
        with self._lock:
            self._known = addresses
            gone = [self._idle.pop(a) for a in list(self._idle) if a not in addresses]
        for connection in (c for connections in gone for c in connections):
            connection.close()

    def close(self) -> None:
        """Close all idle connections."""
        self.retain(())


class _Round:
    """One fan-out: its calls in flight and its errors."""

    def __init__(
        self,
        fanout: Fanout,
        take: Take,
        timeouts: Timeouts,
        course: Course | None,
        by_s: float,
    ) -> None:
        self._fanout = fanout
        self._take = take
        self._timeouts = timeouts
        self._course = course
        self._by_s = by_s
        self._open: dict[int, _Flight] = {}  # by file descriptor
        self._errors: dict[int, CallError] = {}
        self._poll = select.poll()

    def run(
        self,
        calls: Mapping[int, Call] | Sequence[Call],
        meanwhile: Callable[[], None] | None,
    ) -> dict[int, CallError]:
        items = calls.items() if isinstance(calls, Mapping) else enumerate(calls)
        try:
            for position, call in items:
                self._begin(position, call, fresh=False)
            if meanwhile is not None:
                self._send_rest()
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
            connection = self._fanout.connection(call.address, fresh=fresh)
        except CallError as error:
            self._fail(position, call, error)
            return
        try:
            connection.start(self._fanout.head(call), call.frame)
        except CallError as error:
            self._lose(_Flight(position, call, connection, 0.0), error)
            return
        self._open[connection.fileno()] = self._flight(position, call, connection)
        self._poll.register(connection, connection.events)

    def _flight(self, position: int, call: Call, connection: Connection) -> _Flight:
        now_s = time.monotonic()
        flight = _Flight(position, call, connection, now_s)
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

    def _deliver(self, flight: _Flight) -> None:
        connection = flight.connection
        try:
            self._take(flight.position, connection.answer())
        except Refused as error:
            self._fanout.keep(connection)
            self._fail(flight.position, flight.call, error)
            return
        except CallError as error:
            connection.close()
            self._fail(flight.position, flight.call, error)
            return
        except BaseException:
            connection.close()
            raise
        self._fanout.keep(connection)
        if self._course is not None:
            took_s = time.monotonic() - flight.begun_s
            self._course.answered(flight.position, flight.call, took_s)
            if flight.is_paired:
                self._drop_others(flight)

    def _lose(self, flight: _Flight, error: CallError) -> None:
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

    def _drop_others(self, winner: _Flight) -> None:
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

    def _take_time(self, fd: int, flight: _Flight, now_s: float) -> None:
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

    def _give_up(self, fd: int, flight: _Flight) -> None:
        connection = flight.connection
        self._finish(fd)
        connection.close()
        error: CallError = TooSlow(f"{connection.address}: no answer in time")
        if not connection.connected:
            error = CannotConnect(f"{connection.address}: no connection in time")
        self._fail(flight.position, flight.call, error)


@dataclass(slots=True)
class _Flight:
    """A call in flight; times are monotonic.

    Attributes:
        position: what it is for.
        call: what was sent.
        connection: over which.
        begun_s: when.
        connect_by_s: when the connection must be there.
        end_by_s: when the answer must be whole.
        hedge_s: when to ask for a hedge.
        slow_s: when to ask whether it is too slow.
        is_paired: whether another call was made for the same position.
    """

    position: int
    call: Call
    connection: Connection
    begun_s: float
    connect_by_s: float = math.inf
    end_by_s: float = math.inf
    hedge_s: float = math.inf
    slow_s: float = math.inf
    is_paired: bool = False

    @property
    def ends_by_s(self) -> float:
        """When it is given up in any case."""
        return self.end_by_s if self.connection.connected else min(self.end_by_s, self.connect_by_s)

    @property
    def due_s(self) -> float:
        """When something is to be done about it."""
        return min(self.ends_by_s, self.hedge_s, self.slow_s)
