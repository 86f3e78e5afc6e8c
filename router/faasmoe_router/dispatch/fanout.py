"""Calls to several sandboxes at once, from one thread, with one deadline."""

from __future__ import annotations

import select
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from faasmoe_expert.wire.request import Buffer
from faasmoe_router.dispatch.connection import Connection
from faasmoe_router.dispatch.errors import CallError, Refused

MAX_IDLE_PER_ADDRESS = 8

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
    """How long a fan-out may take, in seconds; connecting is part of the whole."""

    connect_timeout_s: float = 1.0
    call_timeout_s: float = 30.0


class Fanout:
    """Keep-alive connections to sandboxes, and rounds of parallel calls over them.

    Belongs to one thread. A call that fails on a connection that was used before is tried once more
    on a new one: the sandbox may have closed it while idle, and calls are pure.
    """

    def __init__(self, *, token: str = "", timeouts: Timeouts | None = None) -> None:
        self._authorization = f"authorization: Bearer {token}\r\n" if token else ""
        self._timeouts = timeouts or Timeouts()
        self._idle: dict[str, list[Connection]] = defaultdict(list)

    def run(self, calls: Sequence[Call], take: Take) -> dict[int, CallError]:
        """Make all calls; return the errors of those that failed, by position.

        Args:
            calls: the calls, sent in order, answered in any order.
            take: gets each answer's position and body; the body is valid during the call. A
                CallError that it raises counts as the call's failure.
        """
        deadline = time.monotonic() + self._timeouts.call_timeout_s
        return _Round(self, calls, take).run(deadline)

    def start(self, call: Call, *, fresh: bool) -> Connection:
        """Send a call on an idle connection, or on a new one; raises CallError."""
        idle = self._idle[call.address]
        if fresh or not idle:
            timeout_s = self._timeouts.connect_timeout_s
            connection = Connection(call.address, connect_timeout_s=timeout_s)
        else:
            connection = idle.pop()
        head = (
            f"POST /v1/functions/{call.function_id} HTTP/1.1\r\nhost: {call.address}\r\n"
            f"{self._authorization}content-length: {call.size_bytes}\r\n\r\n"
        )
        connection.start(head.encode(), call.frame)
        return connection

    def keep(self, connection: Connection) -> None:
        """Take a connection back whose answer was read."""
        idle = self._idle[connection.address]
        if len(idle) < MAX_IDLE_PER_ADDRESS:
            idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Close all idle connections."""
        for connections in self._idle.values():
            for connection in connections:
                connection.close()
        self._idle.clear()


class _Round:
    """One fan-out: its calls in flight and its errors."""

    def __init__(self, fanout: Fanout, calls: Sequence[Call], take: Take) -> None:
        self._fanout = fanout
        self._calls = calls
        self._take = take
        self._open: dict[int, tuple[int, Connection, bool]] = {}  # fd → position, …, fresh
        self._errors: dict[int, CallError] = {}
        self._poll = select.poll()

    def run(self, deadline: float) -> dict[int, CallError]:
        for position in range(len(self._calls)):
            self._begin(position, fresh=False)
        while self._open:
            ready = self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not ready:
                self._give_up()
            for fd, events in ready:
                self._advance(fd, events)
        return self._errors

    def _begin(self, position: int, *, fresh: bool) -> None:
        try:
            connection = self._fanout.start(self._calls[position], fresh=fresh)
        except CallError as error:
            if fresh:
                self._errors[position] = error
            else:
                self._begin(position, fresh=True)
            return
        self._open[connection.fileno()] = (position, connection, fresh)
        self._poll.register(connection, connection.events)

    def _advance(self, fd: int, events: int) -> None:
        position, connection, fresh = self._open[fd]
        try:
            if events & select.POLLOUT:
                connection.send()
            if not (events & ~select.POLLOUT and connection.receive()):
                self._poll.modify(fd, connection.events)
                return
            self._finish(fd)
            self._take(position, connection.answer())
            self._fanout.keep(connection)
        except Refused as error:
            self._errors[position] = error
            self._fanout.keep(connection)
        except CallError as error:
            self._finish(fd)
            connection.close()
            if fresh or not connection.used:
                self._errors[position] = error
            else:
                self._begin(position, fresh=True)

    def _finish(self, fd: int) -> None:
        if self._open.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def _give_up(self) -> None:
        for fd, (position, connection, _) in list(self._open.items()):
            self._finish(fd)
            connection.close()
            self._errors[position] = CallError(f"{connection.address}: no answer in time")
