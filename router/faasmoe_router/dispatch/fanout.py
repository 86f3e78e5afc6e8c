"""Fan-outs: parallel calls to several sandboxes from one thread, over polled sockets.

`Fanout.run` makes all calls of a layer and returns once each has a response or has failed. It keeps
deadlines and runs hedges and retries, but does not choose them: a `RetryPolicy` does. While calls
are in flight it runs the caller's own work, with a bounded number of torch threads.
"""

from __future__ import annotations

import math
import select
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from faasmoe_contracts.tls import TlsPeer
from faasmoe_router.dispatch.transport import (
    MIN_SHARED_FRAME_BYTES,
    Call,
    CallError,
    CallTimeout,
    ConnectError,
    Connection,
    ConnectionPool,
    LostHedge,
    StatusError,
)

SEND_STALL_S = 0.005  # a sandbox that accepts no byte for this long is busy with something else

OverlappedWork = Callable[[], None]
"""Work that the engine's thread does while calls are in flight."""


ResponseHandler = Callable[[int, memoryview], None]
"""Receives a call's position and its response body, which is valid only during the callback."""


@dataclass(frozen=True, slots=True)
class DispatchTimeouts:
    """Nested timeouts of a layer's calls, in seconds.

    Attributes:
        connect_timeout_s: until a sandbox has accepted a new connection.
        call_timeout_s: until a call's response is complete, connecting included.
        layer_timeout_s: until every group of a layer has a result or its local computation has
            started, retries and activation waits included.
    """

    connect_timeout_s: float = 1.0
    call_timeout_s: float = 10.0
    layer_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        """Raise ValueError unless the timeouts are positive and nested."""
        if not 0 < self.connect_timeout_s <= self.call_timeout_s <= self.layer_timeout_s:
            raise ValueError(
                f"timeouts: got connect {self.connect_timeout_s:g} s, call "
                f"{self.call_timeout_s:g} s, layer {self.layer_timeout_s:g} s, expected more than "
                "0 and each at most the next one"
            )


class RetryPolicy(Protocol):
    """Decides on retries and hedges of a fan-out's calls; called from the fan-out's thread."""

    def latency_thresholds_s(self, position: int, call: Call) -> tuple[float, float]:
        """Return after how many seconds to hedge a call, and after how many to abandon it."""

    def hedge(self, position: int, call: Call) -> Call | None:
        """Return a call to run in parallel with a slow one, if any; asked once per call."""

    def abandon_in_s(self, position: int, call: Call, elapsed_s: float) -> float:
        """Return when to abandon a call past its threshold: 0 is now, else when to ask again."""

    def next_attempt(self, position: int, call: Call, error: CallError) -> Call | None:
        """Return the call that replaces a failed one, or None to give up."""

    def on_response(self, position: int, call: Call, elapsed_s: float) -> None:
        """Record a successful call."""

    def on_failure(self, position: int, call: Call, error: CallError) -> None:
        """Record a call that failed or lost against its hedge."""


class Fanout:
    """Runs fan-outs over keep-alive connections.

    Belongs to one thread, except for `retain` and `release_memory`. A call that fails on a reused
    connection before the first byte of a response is repeated once on a new connection: the sandbox
    may have closed the idle connection, and calls are pure.

    Args:
        token: bearer token of the sandboxes.
        timeouts: bounds of each call.
        socket_dir: folder of the Unix sockets of sandboxes on this machine; None for TCP only.
        min_shared_bytes: minimum size of frames that are passed in shared memory.
        tls: how sandboxes are known over TCP; None calls them without TLS.
    """

    def __init__(
        self,
        *,
        token: str = "",
        timeouts: DispatchTimeouts | None = None,
        socket_dir: Path | None = None,
        min_shared_bytes: int = MIN_SHARED_FRAME_BYTES,
        tls: TlsPeer | None = None,
    ) -> None:
        self._pool = ConnectionPool(
            token=token, socket_dir=socket_dir, min_shared_bytes=min_shared_bytes, tls=tls
        )
        self._timeouts = timeouts or DispatchTimeouts()

    def run(
        self,
        calls: Mapping[int, Call] | Sequence[Call],
        handle_response: ResponseHandler,
        *,
        while_waiting: OverlappedWork | None = None,
        retry_policy: RetryPolicy | None = None,
        deadline_s: float = math.inf,
    ) -> dict[int, CallError]:
        """Make all calls; return the errors of those that failed, by position.

        Args:
            calls: the calls, sent in order; responses may arrive in any order.
            handle_response: receives each response's position and body, which is valid only during
                the callback. A CallError that it raises counts as the call's failure; any other
                exception aborts the fan-out.
            while_waiting: work to do once while the calls are in flight, even if there are none.
            retry_policy: decides on retries and hedges; None for neither.
            deadline_s: when to abandon all calls, on the monotonic clock.
        """
        fanout_run = FanoutRun(
            self._pool, handle_response, self._timeouts, retry_policy, deadline_s
        )
        return fanout_run.run(calls, while_waiting)

    def retain(self, addresses: Collection[str]) -> None:
        """Close connections to all other addresses, those in use once they are released.

        Safe from any thread.
        """
        self._pool.retain(addresses)

    def release_memory(self) -> None:
        """Free the memory that idle connections keep; safe from any thread."""
        self._pool.release_memory()

    def close(self) -> None:
        """Close all idle connections."""
        self._pool.close()


class FanoutRun:
    """One fan-out: its pending calls and its errors.

    Args:
        pool: provides connections, and takes them back after a response.
        handle_response: receives each response. A CallError that it raises counts as the call's
            failure.
        timeouts: bounds of each call.
        retry_policy: decides on retries and hedges; None for neither.
        deadline_s: when to abandon all calls, on the monotonic clock.
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
        self, calls: Mapping[int, Call] | Sequence[Call], while_waiting: OverlappedWork | None
    ) -> dict[int, CallError]:
        """Make all calls, and do other work in the meantime; return errors by position."""
        items = calls.items() if isinstance(calls, Mapping) else enumerate(calls)
        try:
            for position, call in items:
                self._start_call(position, call, force_new=False)
            if while_waiting is not None:
                self._do_overlapped_work(while_waiting)
            while self._pending:
                self._poll_once(self._process_due())
            return self._errors
        finally:  # calls are pending only if `handle_response` or `while_waiting` raised
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

    def _do_overlapped_work(self, while_waiting: OverlappedWork) -> None:
        self._send_remaining()
        n_local_calls = sum(p.connection.is_unix_socket for p in self._pending.values())
        with limit_torch_threads(n_local_calls):
            while_waiting()
        self._poll_once(0.0)  # responses that arrived during the work are not late

    def _send_remaining(self) -> None:
        """Send what the sockets did not accept immediately, as long as the sandboxes read."""
        while any(pending.connection.has_unsent for pending in self._pending.values()):
            if not self._poll_once(SEND_STALL_S):
                return

    def _poll_once(self, timeout_s: float) -> bool:
        """Handle the events of all ready calls; return whether there were any in time."""
        ready = self._poll.poll(timeout_s * 1000)
        for fd, events in ready:
            if fd in self._pending:  # an earlier event may have cancelled it
                self._handle_events(fd, events)
        return bool(ready)

    def _handle_events(self, fd: int, events: int) -> None:
        pending = self._pending[fd]
        connection = pending.connection
        try:
            # Read first: an early response explains why the request cannot be sent.
            is_complete = bool(events & ~select.POLLOUT) and connection.receive()
            if not is_complete:
                # What was received may be the rest of a handshake, which the request waits for.
                if (events | connection.events) & select.POLLOUT:
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
        """Repeat a call on a new connection if its old one was stale, else fail it."""
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
            return  # the other call of a hedged pair may still succeed
        next_call = self._retry_policy.next_attempt(position, call, error)
        if next_call is None:
            self._errors[position] = error
        else:
            self._start_call(position, next_call, force_new=False)

    def _cancel_others(self, winner: PendingCall) -> None:
        """Cancel the calls that lost against `winner` for the same position."""
        assert self._retry_policy is not None
        for fd, pending in list(self._pending.items()):
            if pending.position == winner.position:
                self._unregister(fd)
                pending.connection.close()
                error = LostHedge(f"{pending.call.address}: {winner.call.address} was faster")
                self._retry_policy.on_failure(pending.position, pending.call, error)

    def _process_due(self) -> float:
        """Hedge and abandon the calls that are due; return the seconds until the next one is."""
        now_s, next_event_s = time.monotonic(), math.inf
        for fd, pending in list(self._pending.items()):
            due_at_s = pending.next_event_s
            if due_at_s > now_s:
                next_event_s = min(next_event_s, due_at_s)
                continue
            self._handle_due(fd, pending, now_s)
            next_event_s = now_s  # run again: a retry or hedge may be pending now
        return max(0.0, next_event_s - now_s) if self._pending else 0.0

    def _handle_due(self, fd: int, pending: PendingCall, now_s: float) -> None:
        position, call = pending.position, pending.call
        if pending.deadline_s <= now_s:
            self._abandon(fd, pending)
        elif pending.abandon_at_s <= now_s:
            assert self._retry_policy is not None
            elapsed_s = now_s - pending.started_s
            if wait_s := self._retry_policy.abandon_in_s(position, call, elapsed_s):
                pending.abandon_at_s = now_s + wait_s
            else:
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

    def _unregister(self, fd: int) -> None:
        # Before the socket is closed: a new connection may reuse the descriptor.
        del self._pending[fd]
        self._poll.unregister(fd)


@dataclass(slots=True)
class PendingCall:
    """A call in flight; times are seconds of the monotonic clock.

    Attributes:
        position: the call's position in the fan-out.
        call: the call that was sent.
        connection: the connection it was sent over.
        started_s: when it was sent.
        connect_deadline_s: when the connection must be established.
        response_deadline_s: when the response must be complete.
        hedge_at_s: when to ask the retry policy for a hedge.
        abandon_at_s: when to ask the retry policy whether to abandon the call.
        is_hedged: whether another call was started for the same position.
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
        """When to abandon the call unconditionally."""
        if self.connection.is_connected:
            return self.response_deadline_s
        return min(self.response_deadline_s, self.connect_deadline_s)

    @property
    def next_event_s(self) -> float:
        """When the call is next due for a hedge, a decision or abandonment."""
        return min(self.deadline_s, self.hedge_at_s, self.abandon_at_s)


@contextmanager
def limit_torch_threads(n_local_calls: int) -> Iterator[None]:
    """Run torch in one thread if the functions of this machine occupy the other cores.

    Threads of one matrix product synchronise at its end. On a core that another process occupies,
    they wait until the scheduler gives them that core. Where the functions leave cores free, all
    threads are used: setting the thread count to anything but one creates new threads.

    Args:
        n_local_calls: number of functions on this machine that are computing, in one thread each.
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
