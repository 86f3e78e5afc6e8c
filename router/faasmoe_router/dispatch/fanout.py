"""Calls to several sandboxes at once, from one thread, with one deadline."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from faasmoe_expert.wire.request import Buffer
from faasmoe_router.dispatch.connection import Connection
from faasmoe_router.dispatch.errors import CallError, CannotConnect, Refused

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


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long a fan-out may take, in seconds; connecting is part of the whole.

    Attributes:
        connect_timeout_s: until a sandbox has accepted a new connection.
        call_timeout_s: until all answers are whole.
    """

    connect_timeout_s: float = 1.0
    call_timeout_s: float = 30.0


class Fanout:
    """Keep-alive connections to sandboxes, and rounds of parallel calls over them.

    Belongs to one thread, but for `retain`. A call that fails on a connection that was used before,
    without a byte of an answer, is made once more on a new one: the sandbox may have closed it
    while idle, and calls are pure.
    """

    def __init__(self, *, token: str = "", timeouts: Timeouts | None = None) -> None:
        self._authorization = f"authorization: Bearer {token}\r\n" if token else ""
        self._timeouts = timeouts or Timeouts()
        self._idle: dict[str, list[Connection]] = {}
        self._known: Collection[str] | None = None  # None: every address
        self._lock = threading.Lock()  # of the two above

    def run(
        self, calls: Sequence[Call], take: Take, *, meanwhile: Callable[[], None] | None = None
    ) -> dict[int, CallError]:
        """Make all calls; return the errors of those that failed, by position.

        Args:
            calls: the calls, sent in order, answered in any order.
            take: gets each answer's position and body; the body is valid during the call. A
                CallError that it raises counts as the call's failure.
            meanwhile: work to do once while the calls are away.
        """
        return _Round(self, calls, take, self._timeouts).run(meanwhile)

    def connection(self, address: str, *, fresh: bool) -> Connection:
        """Return an idle connection, or a new one; raises CallError."""
        if not fresh:
            with self._lock:
                if idle := self._idle.get(address):
                    return idle.pop()
        return Connection(address)

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
        self, fanout: Fanout, calls: Sequence[Call], take: Take, timeouts: Timeouts
    ) -> None:
        self._fanout = fanout
        self._calls = calls
        self._take = take
        self._connect_timeout_s = timeouts.connect_timeout_s
        self._deadline_s = time.monotonic() + timeouts.call_timeout_s
        self._open: dict[int, _Flight] = {}  # by file descriptor
        self._errors: dict[int, CallError] = {}
        self._poll = select.poll()

    def run(self, meanwhile: Callable[[], None] | None) -> dict[int, CallError]:
        try:
            for position in range(len(self._calls)):
                self._begin(position, fresh=False)
            if meanwhile is not None:
                self._send_rest()
                meanwhile()
            while self._open:
                left_s = self._time_left()
                for fd, events in self._poll.poll(left_s * 1000):
                    self._advance(fd, events)
            return self._errors
        finally:  # what is left if `take` raised
            for flight in self._open.values():
                flight.connection.close()

    def _begin(self, position: int, *, fresh: bool) -> None:
        call = self._calls[position]
        try:
            connection = self._fanout.connection(call.address, fresh=fresh)
        except CallError as error:
            self._errors[position] = error
            return
        try:
            connection.start(self._fanout.head(call), call.frame)
        except CallError as error:
            self._fail(position, connection, error)
            return
        connect_by_s = time.monotonic() + self._connect_timeout_s
        self._open[connection.fileno()] = _Flight(position, connection, connect_by_s)
        self._poll.register(connection, connection.events)

    def _send_rest(self) -> None:
        """Send what the sockets did not take at once, as long as the sandboxes read."""
        while any(flight.connection.events & select.POLLOUT for flight in self._open.values()):
            ready = self._poll.poll(SENDING_PAUSE_S * 1000)
            if not ready:
                return
            for fd, events in ready:
                self._advance(fd, events)

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
            self._fail(flight.position, connection, error)
            return
        self._finish(fd)
        self._deliver(flight.position, connection)

    def _deliver(self, position: int, connection: Connection) -> None:
        try:
            self._take(position, connection.answer())
        except Refused as error:
            self._errors[position] = error
        except CallError as error:
            self._errors[position] = error
            connection.close()
            return
        except BaseException:
            connection.close()
            raise
        self._fanout.keep(connection)

    def _fail(self, position: int, connection: Connection, error: CallError) -> None:
        connection.close()
        if connection.is_stale:
            self._begin(position, fresh=True)
        else:
            self._errors[position] = error

    def _finish(self, fd: int) -> None:
        # Before the socket is closed: a new connection may get the same descriptor.
        del self._open[fd]
        self._poll.unregister(fd)

    def _time_left(self) -> float:
        """Give up the calls whose time is over; return for how long to wait for the others."""
        now_s, next_s = time.monotonic(), self._deadline_s
        for fd, flight in list(self._open.items()):
            connection = flight.connection
            by_s = self._deadline_s
            if not connection.connected:
                by_s = min(by_s, flight.connect_by_s)
            if by_s > now_s:
                next_s = min(next_s, by_s)
                continue
            self._finish(fd)
            connection.close()
            self._errors[flight.position] = (
                CallError(f"{connection.address}: no answer in time")
                if connection.connected
                else CannotConnect(f"{connection.address}: no connection in time")
            )
        return max(0.0, next_s - now_s) if self._open else 0.0


@dataclass(frozen=True, slots=True)
class _Flight:
    """A call in flight; the connection must be there by `connect_by_s` (monotonic)."""

    position: int
    connection: Connection
    connect_by_s: float
