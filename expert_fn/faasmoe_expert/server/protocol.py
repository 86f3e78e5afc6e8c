"""HTTP/1.1 on one connection: requests in, a route's answers out.

Frames are computed in the event loop's own thread, one after the other: a sandbox has its cores for
one frame at a time, so a queue of threads would only add hops. An answer may be one to come, while
a function is being attached or frames are gathered; later requests of that connection wait for it.
Bounds on time are here, those on head and body in reading.py. A malformed request ends its
connection, never the sandbox.
"""

from __future__ import annotations

import asyncio
import functools
from asyncio import Future
from collections import deque
from collections.abc import Hashable
from typing import cast

from faasmoe_expert.config import (
    IDLE_TIMEOUT_S,
    MAX_BODIES_BYTES,
    MAX_CONNECTIONS,
    MAX_FRAMES,
)
from faasmoe_expert.errors import BadFrame
from faasmoe_expert.server.answer import Answer
from faasmoe_expert.server.intake import Intake
from faasmoe_expert.server.reading import RequestReader
from faasmoe_expert.server.request import Handle, HttpRequest
from faasmoe_expert.server.sharing import SharedInbox
from faasmoe_expert.shared_region import peer_pid


class HttpProtocol(asyncio.Protocol):
    """One client connection.

    Args:
        handle: computes answers.
        connections: the server's open connections; this one adds and removes itself.
        timeout_s: time for a request to be read whole, and for answers to be taken.
        idle_timeout_s: time after which a connection without a request is closed.
        max_connections: open connections with which another one is refused.
        intake: bounds what is read on all connections together.
    """

    closed: asyncio.Future[None]

    def __init__(
        self,
        handle: Handle,
        connections: set[HttpProtocol],
        *,
        timeout_s: float,
        idle_timeout_s: float = IDLE_TIMEOUT_S,
        max_connections: int = MAX_CONNECTIONS,
        intake: Intake | None = None,
    ) -> None:
        self._handle = handle
        self._connections = connections
        self._timeout_s = timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._max_connections = max_connections
        intake = intake or Intake(max_frames=MAX_FRAMES, max_bytes=MAX_BODIES_BYTES)
        self._reader = RequestReader(intake, begun=self._begin, whole=self._take)
        self._idle: asyncio.TimerHandle | None = None  # looks now and then; see _end_if_idle
        self._deadline: asyncio.TimerHandle | None = None  # of the request that is being read
        self._stalled: asyncio.TimerHandle | None = None  # of answers that the client must take
        self._inbox: SharedInbox | None = None
        self._waiting: deque[tuple[HttpRequest, bool]] = deque()  # read, not answered; stays open
        self._coming: Future[Answer] | None = None
        self._is_stalled = False
        self._after: Answer | None = None  # the refusal of what came behind
        self._ends = False  # once what is coming has come

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to listen to a client, unless there are too many."""
        self._loop = asyncio.get_running_loop()
        self._transport = cast(asyncio.Transport, transport)
        self.closed = self._loop.create_future()
        self._sender = sender_of(self._transport)
        self._connections.add(self)
        if len(self._connections) > self._max_connections:
            message = f"connections: got one more than the {self._max_connections} allowed"
            self._write(Answer.of_error(503, "too_many_connections", message), keep_alive=False)
            return
        self._used_s = self._loop.time()
        self._idle = self._loop.call_later(self._idle_timeout_s, self._end_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a client that left."""
        self._connections.discard(self)
        self._reader.close()
        for request, _ in self._waiting:
            self._reader.leave(request)
        self._stop_deadline()
        self._stop_stalled()
        if self._idle is not None:
            self._idle.cancel()
        if not self.closed.done():
            self.closed.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Read requests; what is whole is answered at once."""
        refusal = self._reader.feed(data)
        if refusal is not None:
            self._refuse(refusal)

    def pause_writing(self) -> None:
        """Read no more from a client that does not take its answers, and end it in time."""
        self._is_stalled = True
        self._read_or_not()
        self._expect_progress()

    def resume_writing(self) -> None:
        """Read on."""
        self._is_stalled = False
        if not self._transport.is_closing():
            self._stop_stalled()
            self._read_or_not()

    def close(self) -> None:
        """End the connection once what was begun is answered, and what was written is sent."""
        self._ends = True
        if self._coming is not None:
            return
        self._transport.close()
        self._expect_progress()

    def abort(self) -> None:
        """End the connection at once."""
        self._transport.abort()

    def _begin(self) -> None:
        """Give the client its time to send a request."""
        self._deadline = self._loop.call_later(self._timeout_s, self._give_up)

    def _take(self, request: HttpRequest, keep_alive: bool) -> None:
        """Answer a request that is whole."""
        self._stop_deadline()
        if self._transport.is_closing():
            self._reader.leave(request)
            return
        request.sender = self._sender
        self._waiting.append((request, keep_alive))
        self._answer_waiting()

    def _answer_waiting(self) -> None:
        """Answer what was read, in order, as far as answers are not to come."""
        while self._waiting and self._coming is None and not self._transport.is_closing():
            request, keep_alive = self._waiting.popleft()
            answer = self._answer(request)
            if isinstance(answer, Answer):
                self._finish(request, answer, keep_alive=keep_alive)
            else:
                self._coming = answer
                came = functools.partial(self._came, request, keep_alive=keep_alive)
                answer.add_done_callback(came)
                self._read_or_not()

    def _came(self, request: HttpRequest, answer: Future[Answer], *, keep_alive: bool) -> None:
        self._coming = None
        if answer.cancelled() or self._transport.is_closing():  # the sandbox, or the client, ends
            self._reader.leave(request)
            return
        self._finish(request, answer.result(), keep_alive=keep_alive and not self._ends)
        self._answer_waiting()
        if self._after is not None and self._coming is None:
            self._write(self._after, keep_alive=False)
        self._read_or_not()

    def _finish(self, request: HttpRequest, answer: Answer, *, keep_alive: bool) -> None:
        self._reader.leave(request)
        answer = self._shared(request, answer)
        self._write(answer, keep_alive=keep_alive, is_head=request.method == "HEAD")
        self._used_s = self._loop.time()

    def _read_or_not(self) -> None:
        if self._transport.is_closing():
            return
        if self._coming is not None or self._is_stalled:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def _answer(self, request: HttpRequest) -> Answer | Future[Answer]:
        place, offer = request.shared_place, request.shared_offer
        if place is None and offer is None:
            return self._handle(request)
        if self._inbox is None:
            self._inbox = SharedInbox(peer_pid(self._transport.get_extra_info("socket")))
        if place is not None:
            try:
                request.shared = self._inbox.frame(place)
            except BadFrame as error:
                return Answer.of_json(error.status, error.to_json())
        return self._handle(request)

    def _shared(self, request: HttpRequest, answer: Answer) -> Answer:
        """Return what is left to send of an answer that may lie in shared memory."""
        if self._inbox is None:
            return answer
        if request.shared is not None:
            return self._inbox.place(answer, len(request.shared))
        if request.shared_offer is not None:
            return self._inbox.accept(request.shared_offer, answer)
        return answer

    def _write(self, answer: Answer, *, keep_alive: bool, is_head: bool = False) -> None:
        stay = keep_alive and not answer.close
        if self._transport.is_closing():
            return
        body = () if is_head else answer.body
        self._transport.writelines([answer.head(keep_alive=stay), *body])
        if not stay:
            self.close()

    def _refuse(self, answer: Answer) -> None:
        self._stop_deadline()
        if self._coming is not None:
            self._after = answer
            return
        self._write(answer, keep_alive=False)

    def _give_up(self) -> None:
        message = f"request: got a part of it in {self._timeout_s:g} s, expected all of it"
        self._refuse(Answer.of_error(408, "request_timeout", message))

    def _end_if_idle(self) -> None:
        """Close a connection that was not used; one timer, so that a request costs none."""
        left_s = self._used_s + self._idle_timeout_s - self._loop.time()
        if self._reader.is_reading or self._coming is not None:  # which end by themselves
            left_s = self._idle_timeout_s
        if left_s > 0:
            self._idle = self._loop.call_later(left_s, self._end_if_idle)
        else:
            self.close()

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _stop_stalled(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _expect_progress(self) -> None:
        if self._stalled is None:
            self._stalled = self._loop.call_later(self._timeout_s, self._transport.abort)


def sender_of(transport: asyncio.Transport) -> Hashable:
    """Return who is at the other end: a process of this machine, or a host."""
    pid = peer_pid(transport.get_extra_info("socket"))
    name = transport.get_extra_info("peername")
    return pid if pid is not None else name[0] if name else None
