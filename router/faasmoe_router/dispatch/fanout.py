"""How many cores the router takes while functions compute on the same ones.

A call that is under way, and when something is to be done about it.

One fan-out: each of its calls was answered or has failed when it ends.

What is tried instead of a call that failed, or beside one that takes long, is not known here: a
`Course` says so.

Calls to several sandboxes at once, from one thread.
"""

from __future__ import annotations

import math
import select
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from faasmoe_router.dispatch.calls import (
    Call,
    CallError,
    CallTimeout,
    ConnectError,
    DispatchTimeouts,
    LostHedge,
    ResponseHandler,
    RetryPolicy,
    StatusError,
)
from faasmoe_router.dispatch.transport import MIN_SHARED_FRAME_BYTES, Connection, ConnectionPool


@contextmanager
def limit_torch_threads(n_local_calls: int) -> Iterator[None]:
    """Compute in one thread, if functions that compute in one each take the other cores.

    Threads of one product wait for each other at its end, and on a core that somebody else has they
    wait for as long as the system gives that one. Where cores are left beyond the functions', all
    threads are used: to change their number to anything but one makes new ones.

    Args:
        n_calls: functions of this machine that are computing now.
    """
    n_threads = torch.get_num_threads()
    if not n_local_calls or n_threads == 1 or n_local_calls < n_threads - 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


@dataclass(slots=True)
class PendingCall:
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
    started_s: float
    connect_deadline_s: float = math.inf
    response_deadline_s: float = math.inf
    hedge_at_s: float = math.inf
    abandon_at_s: float = math.inf
    is_hedged: bool = False

    @property
    def deadline_s(self) -> float:
        """When it is given up in any case."""
        return (
            self.response_deadline_s
            if self.connection.is_connected
            else min(self.response_deadline_s, self.connect_deadline_s)
        )

    @property
    def next_event_s(self) -> float:
        """When something is to be done about it."""
        return min(self.deadline_s, self.hedge_at_s, self.abandon_at_s)


SEND_STALL_S = 0.005  # a sandbox that takes no byte for so long is busy with something else


class FanoutCall:
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
        handle_response: ResponseHandler,
        timeouts: DispatchTimeouts,
        retry_policy: RetryPolicy | None,
        deadline_s: float,
    ) -> None:
        self._pool = pool
        self._handle_response = handle_response
        self._timeouts = timeouts
        self._retry_policy = retry_policy
        self._deadline_s = deadline_s
        self._pending: dict[int, PendingCall] = {}  # by file descriptor
        self._errors: dict[int, CallError] = {}
        self._poll = select.poll()

    def run(
        self,
        calls: Mapping[int, Call] | Sequence[Call],
        while_waiting: Callable[[], None] | None,
    ) -> dict[int, CallError]:
        """Make all calls, and other work while they are away; return errors by position."""
        items = calls.items() if isinstance(calls, Mapping) else enumerate(calls)
        try:
            for position, call in items:
                self._start_call(position, call, force_new=False)
            if while_waiting is not None:
                self._send_remaining()
                with limit_torch_threads(
                    sum(f.connection.is_unix_socket for f in self._pending.values())
                ):
                    while_waiting()
                self._poll_once(0.0)  # what has come meanwhile is not late
            while self._pending:
                self._poll_once(self._process_due())
            return self._errors
        finally:  # what is left if `take` raised
            for pending in self._pending.values():
                pending.connection.close()

    def _start_call(self, position: int, call: Call, *, force_new: bool) -> None:
        try:
            connection = self._pool.acquire(call.address, force_new=force_new)
        except CallError as error:
            self._handle_failure(position, call, error)
            return
        try:
            connection.send_request(self._pool.request_head(call), call.frame)
        except CallError as error:
            self._handle_broken_connection(PendingCall(position, call, connection, 0.0), error)
            return
        self._pending[connection.fileno()] = self._new_pending_call(position, call, connection)
        self._poll.register(connection, connection.events)

    def _new_pending_call(self, position: int, call: Call, connection: Connection) -> PendingCall:
        now_s = time.monotonic()
        pending = PendingCall(position, call, connection, now_s)
        pending.connect_deadline_s = now_s + self._timeouts.connect_timeout_s
        pending.response_deadline_s = min(self._deadline_s, now_s + self._timeouts.call_timeout_s)
        if self._retry_policy is not None:
            hedge_s, abandon_s = self._retry_policy.latency_thresholds_s(position, call)
            pending.hedge_at_s, pending.abandon_at_s = now_s + hedge_s, now_s + abandon_s
        return pending

    def _send_remaining(self) -> None:
        """Send what the sockets did not take at once, as long as the sandboxes read."""
        while any(pending.connection.events & select.POLLOUT for pending in self._pending.values()):
            if not self._poll_once(SEND_STALL_S):
                return

    def _poll_once(self, timeout_s: float) -> bool:
        """Go on with the calls that can; return whether there was one in time."""
        ready = self._poll.poll(timeout_s * 1000)
        for fd, events in ready:
            if fd in self._pending:  # it may have been overtaken since
                self._handle_events(fd, events)
        return bool(ready)

    def _handle_events(self, fd: int, events: int) -> None:
        pending = self._pending[fd]
        connection = pending.connection
        try:
            # An answer first: one that came before the whole call was sent tells why.
            is_complete = bool(events & ~select.POLLOUT) and connection.receive()
            if not is_complete:
                if events & select.POLLOUT:
                    connection.send_pending()
                    self._poll.modify(fd, connection.events)
                return
        except CallError as error:
            self._unregister(fd)
            self._handle_broken_connection(pending, error)
            return
        self._unregister(fd)
        self._handle_complete(pending)

    def _handle_complete(self, pending: PendingCall) -> None:
        connection = pending.connection
        try:
            self._handle_response(pending.position, connection.response_body())
        except StatusError as error:
            self._pool.release(connection)
            self._handle_failure(pending.position, pending.call, error)
            return
        except CallError as error:
            connection.close()
            self._handle_failure(pending.position, pending.call, error)
            return
        except BaseException:
            connection.close()
            raise
        self._pool.release(connection)
        if self._retry_policy is not None:
            elapsed_s = time.monotonic() - pending.started_s
            self._retry_policy.on_response(pending.position, pending.call, elapsed_s)
            if pending.is_hedged:
                self._cancel_others(pending)

    def _handle_broken_connection(self, pending: PendingCall, error: CallError) -> None:
        """Go on after a connection that broke."""
        pending.connection.close()
        if pending.connection.is_stale:
            self._start_call(pending.position, pending.call, force_new=True)
        else:
            self._handle_failure(pending.position, pending.call, error)

    def _handle_failure(self, position: int, call: Call, error: CallError) -> None:
        if self._retry_policy is None:
            self._errors[position] = error
            return
        self._retry_policy.on_failure(position, call, error)
        if any(pending.position == position for pending in self._pending.values()):
            return  # its hedge, or what it hedged, may still answer
        next_call = self._retry_policy.next_attempt(position, call, error)
        if next_call is None:
            self._errors[position] = error
        else:
            self._start_call(position, next_call, force_new=False)

    def _cancel_others(self, winner: PendingCall) -> None:
        """Give up the call that was overtaken by another one for the same part."""
        assert self._retry_policy is not None
        for fd, pending in list(self._pending.items()):
            if pending.position == winner.position:
                self._unregister(fd)
                pending.connection.close()
                error = LostHedge(f"{pending.call.address}: {winner.call.address} was faster")
                self._retry_policy.on_failure(pending.position, pending.call, error)

    def _unregister(self, fd: int) -> None:
        # Before the socket is closed: a new connection may get the same descriptor.
        del self._pending[fd]
        self._poll.unregister(fd)

    def _process_due(self) -> float:
        """Hedge and give up the calls whose time has come; return how long to wait for others."""
        now_s, next_event_s = time.monotonic(), math.inf
        for fd, pending in list(self._pending.items()):
            due_at_s = pending.next_event_s
            if due_at_s > now_s:
                next_event_s = min(next_event_s, due_at_s)
                continue
            self._handle_due(fd, pending, now_s)
            next_event_s = now_s  # look again: there may be another call now
        return max(0.0, next_event_s - now_s) if self._pending else 0.0

    def _handle_due(self, fd: int, pending: PendingCall, now_s: float) -> None:
        """Do what is due for one call."""
        position, call = pending.position, pending.call
        if pending.deadline_s <= now_s:
            self._abandon(fd, pending)
        elif pending.abandon_at_s <= now_s:
            pending.abandon_at_s = math.inf
            assert self._retry_policy is not None
            if self._retry_policy.should_abandon(position, call):
                self._abandon(fd, pending)
        else:
            pending.hedge_at_s = math.inf
            assert self._retry_policy is not None
            hedge = self._retry_policy.hedge(position, call)
            if hedge is not None:
                pending.is_hedged = True
                self._start_hedge(position, hedge)

    def _start_hedge(self, position: int, call: Call) -> None:
        self._start_call(position, call, force_new=False)
        for pending in self._pending.values():
            if pending.position == position:
                pending.is_hedged, pending.hedge_at_s = True, math.inf

    def _abandon(self, fd: int, pending: PendingCall) -> None:
        connection = pending.connection
        self._unregister(fd)
        connection.close()
        error: CallError = CallTimeout(f"{connection.address}: no response in time")
        if not connection.is_connected:
            error = ConnectError(f"{connection.address}: no connection in time")
        self._handle_failure(pending.position, pending.call, error)


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
        timeouts: DispatchTimeouts | None = None,
        socket_dir: Path | None = None,
        min_shared_bytes: int = MIN_SHARED_FRAME_BYTES,
    ) -> None:
        self._pool = ConnectionPool(
            token=token, socket_dir=socket_dir, min_shared_bytes=min_shared_bytes
        )
        self._timeouts = timeouts or DispatchTimeouts()

    def run(
        self,
        calls: Mapping[int, Call] | Sequence[Call],
        handle_response: ResponseHandler,
        *,
        while_waiting: Callable[[], None] | None = None,
        retry_policy: RetryPolicy | None = None,
        deadline_s: float = math.inf,
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
        return FanoutCall(
            self._pool, handle_response, self._timeouts, retry_policy, deadline_s
        ).run(calls, while_waiting)

    def retain(self, addresses: Collection[str]) -> None:
        """Close the connections to all other addresses, those in use once they are answered.

        Their sandboxes are gone. May be called from any thread.
        """
        self._pool.retain(addresses)

    def release_memory(self) -> None:
        """Give back memory that idle connections keep; from any thread."""
        self._pool.release_memory()

    def close(self) -> None:
        """Close all idle connections."""
        self._pool.close()
