"""Relays one request to the router, and its response to the client, whatever becomes of the router.

While no router listens, requests wait. One that has answered nothing is sent again as it was; one
that has streamed goes on from its journal, and the client sees a pause. A request during which
routers died several times without anything new may be what they die of, and fails.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from starlette.types import Send

from faasmoe_contracts.stream_records import (
    EVENT,
    INPUT_TOKENS_HEADER,
    OUTPUT_TOKENS_HEADER,
    RECORDS_HEADER,
    RecordReader,
    StreamRecordError,
)
from faasmoe_contracts.tls import TlsPeer
from faasmoe_gateway.errors import error_body, send_error
from faasmoe_gateway.held_request import HeldRequest
from faasmoe_gateway.router_losses import RouterLosses
from faasmoe_gateway.router_pool import RouterKey, RouterPool
from faasmoe_gateway.sender_turns import Turn
from faasmoe_gateway.upstream import (
    KeptConnectionLost,
    ResponseHead,
    RouterAway,
    RouterConnection,
    RouterLost,
)
from faasmoe_tracing import NO_SPAN, Span

logger = logging.getLogger(__name__)

RETRY_S = 0.02
BUSY_RETRY_S = 1.0
PROBE_HOLD_S = 2.0  # of what is no work: probes should learn that the router is away
MAX_BUFFERED_BYTES = 1 << 20  # of a response that can still be had from another router
MAX_TURN_S = 0.25  # in which a router should have prepared a request; it may not say so, or hang
COMMENT_S = 15.0
COMMENT_FRAME = b": waiting\n\n"
MAX_HELD_REQUESTS = 1024
MESSAGES_PATH = b"/v1/messages"
PAGE_PATH = b"/ui"
RETRYABLE = (429, 503)
_DROPPED_HEADERS = frozenset(
    (
        *(b"connection", b"keep-alive", b"transfer-encoding", b"date", b"server"),
        *(name.encode() for name in (RECORDS_HEADER, INPUT_TOKENS_HEADER, OUTPUT_TOKENS_HEADER)),
    )
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RouterAddress:
    """Where the router is.

    Attributes:
        address: a Unix socket, or HOST:PORT.
        front_token: what to show it.
        hold_timeout_s: how long requests wait while it is away.
        tls: how it is known over TCP; None connects without TLS.
    """

    address: str
    front_token: str
    hold_timeout_s: float
    tls: TlsPeer | None = None


def is_page_path(path: bytes) -> bool:
    """Return whether a path is of the live page."""
    return path == PAGE_PATH or path.startswith(PAGE_PATH + b"/")


class TokenMeter:
    """Counts the tokens of one request, as its routers tell.

    Attributes:
        input_tokens: tokens of its prompts; None until they are known.
        output_tokens: tokens generated so far.
    """

    def __init__(self) -> None:
        self.input_tokens: int | None = None
        self.output_tokens = 0

    def read_head(self, head: ResponseHead) -> None:
        """Take what the head of a response tells; prompts count once, however often they are sent.

        The router is trusted, so a header that is no number is a fault of the program.
        """
        for name, value in head.headers:
            if name == INPUT_TOKENS_HEADER.encode():
                self.input_tokens = int(value)
            elif name == OUTPUT_TOKENS_HEADER.encode():
                self.output_tokens += int(value)

    def add_output(self, n_tokens: int) -> None:
        """Count generated tokens of a stream."""
        self.output_tokens += n_tokens


class WaitingRequests:
    """Counts the requests that wait for a router."""

    def __init__(self) -> None:
        self.n = 0


class RouterBusy(Exception):
    """The router is ending, or the next one has no place for a stream yet."""


class RequestFailed(Exception):
    """The request cannot be answered; the message is for the client."""

    def __init__(self, message: str, *, status: int = 503) -> None:
        super().__init__(message)
        self.status = status


class ClientResponse:
    """What one client has got of its response.

    Args:
        send: the ASGI callable.
        is_messages: whether errors of its streams have Anthropic's form.

    Attributes:
        has_started: whether its head is sent.
        headers: further headers of its head.
    """

    def __init__(self, send: Send, *, is_messages: bool) -> None:
        self._send = send
        self._is_messages = is_messages
        self.has_started = False
        self.headers: dict[str, str] = {}

    async def start(self, head: ResponseHead) -> None:
        """Send the head."""
        self.has_started = True
        headers = [h for h in head.headers if h[0] not in _DROPPED_HEADERS]
        headers += [(name.encode(), value.encode()) for name, value in self.headers.items()]
        await self._send({"type": "http.response.start", "status": head.status, "headers": headers})

    async def write(self, body: bytes) -> None:
        """Send a part of the body."""
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self, body: bytes = b"") -> None:
        """Send the last part of the body."""
        await self._send({"type": "http.response.body", "body": body})

    async def fail(self, message: str, *, status: int) -> None:
        """End the response with an error: its own, or the last event of a stream."""
        code = "service_unavailable" if status == 503 else "internal_error"
        if not self.has_started:
            await send_error(self._send, message, status=status, code=code)
            return
        event = json.loads(error_body(message, status=status, code=code))
        prefix = b""
        if self._is_messages:
            error = {"type": "overloaded_error", "message": message}
            prefix, event = b"event: error\n", {"type": "error", "error": error}
        await self.end(prefix + b"data: " + json.dumps(event).encode() + b"\n\n")


class Relay:
    """Relays one request.

    Args:
        request: the request.
        client: its response.
        router: where the router is.
        waiting: counts the requests that wait.
        pool: connects to routers.
        take_turn: waits for the sender's turn.
        keeps_turn: whether the request has it until the router has prepared it, not only until it
            is handed on; not where strangers are one sender, and would wait for each other.
        choose: returns where to connect at each attempt, None while no router takes requests; if
            omitted, to `router`.
        on_head: called after the head of each response.
        span: the request's span.

    Attributes:
        meter: counts its tokens.
        has_failed: whether it could not be answered.
        waited_s: time that it waited for its turn and for a router.
    """

    def __init__(
        self,
        request: HeldRequest,
        client: ClientResponse,
        router: RouterAddress,
        waiting: WaitingRequests,
        *,
        pool: RouterPool,
        take_turn: Callable[[], Awaitable[Turn]],
        keeps_turn: bool = False,
        choose: Callable[[], RouterAddress | None] | None = None,
        on_head: Callable[[], None] = lambda: None,
        span: Span = NO_SPAN,
    ) -> None:
        self.meter = TokenMeter()
        self.has_failed = False
        self.waited_s = 0.0
        self._span = span
        self._pool = pool
        self._needs_new_connection = False
        self._take_turn = take_turn
        self._keeps_turn = keeps_turn and request.is_work
        self._turn: Turn | None = None  # from before it is handed on until it is prepared
        self._choose = choose
        self._on_head = on_head
        self._request = request
        self._client = client
        self._router = router
        self._waiting = waiting
        self._status = 0
        self._has_records = False  # what the client gets is a stream that can go on

    @property
    def status(self) -> int:
        """Status of the last response of a router; 0 if there was none."""
        return self._status

    @property
    def is_authenticated(self) -> bool:
        """Whether the router has accepted the key that the client showed."""
        return self._request.has_key and 0 < self._status < 500 and self._status not in (401, 403)

    async def run(self) -> None:
        """Relay until the response is complete or cannot be had."""
        try:
            await self._run()
        except RequestFailed as error:
            self.has_failed = True
            await self._client.fail(str(error), status=error.status)

    async def _run(self) -> None:
        losses, busy_until_s = RouterLosses(), math.inf
        while True:
            try:
                await self._attempt()
                return
            except RouterBusy:
                now_s = time.monotonic()
                busy_until_s = min(busy_until_s, now_s + self._router.hold_timeout_s)
                if now_s >= busy_until_s:
                    raise RequestFailed("The server was restarted and is overloaded.") from None
                await self._commented(asyncio.sleep(BUSY_RETRY_S))
                continue
            except KeptConnectionLost:  # the router may just not have kept it
                self._needs_new_connection = True
                continue
            except RouterLost:
                if not self._request.can_repeat:
                    message = "The server was restarted; this request is too large to be repeated."
                    raise RequestFailed(message) from None
            if self._client.has_started and not self._has_records:
                raise RequestFailed("The server was restarted during this response.")
            if not losses.count(self._request.n_frames, time.monotonic()):
                await asyncio.sleep(RETRY_S)
                continue
            if losses.is_suspect:
                message = "The server was restarted repeatedly while it computed this request."
                raise RequestFailed(message, status=500)
            busy_until_s = math.inf
            logger.warning(
                "The router was lost; sending a request again, after %d events",
                self._request.n_frames,
            )

    async def _attempt(self) -> None:
        """Send the request once and relay the response; raises RouterLost."""
        try:
            connection = await self._commented(self._connect())
            await self._relay_over(connection)
        finally:
            self._release_turn()

    async def _relay_over(self, connection: RouterConnection) -> None:
        router = RouterKey(self._router.address, self._router.tls)
        connection.on_prepared = self._release_turn
        turn_end = asyncio.get_running_loop().call_later(MAX_TURN_S, self._release_turn)
        sending: asyncio.Task[None] | None = None
        try:
            if connection.send_small(self._request, self._router.front_token):
                head = await self._commented(connection.read_head())
            else:
                send = connection.send(self._request, self._router.front_token)
                sending = asyncio.create_task(send)
                head = await self._commented(_first_of(connection.read_head(), sending))
            self._release_turn()
            if head.is_draining and self._request.is_work and self._request.can_repeat:
                raise RouterBusy
            self._status = head.status
            self.meter.read_head(head)
            self._on_head()
            if self._client.has_started:
                await self._resume(connection, head)
            elif head.has_records:
                self._has_records = True
                await self._client.start(head)
                await self._relay_records(connection)
            else:
                await self._relay_response(connection, head)
        finally:
            turn_end.cancel()
            self._pool.give_back(router, connection)
            if sending is not None:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)

    async def _connect(self) -> RouterConnection:
        """Connect, and wait while no router listens; raises RequestFailed."""
        start_s = time.monotonic()
        try:
            with self._span.child("queue"):
                # What waits for its client is handed on without holding up the sender's others.
                self._keeps_turn = self._keeps_turn and await self._request.read_ahead()
                try:
                    return await self._open()
                except RouterAway:
                    return await self._wait_for_router()
        finally:
            self.waited_s += time.monotonic() - start_s

    async def _wait_for_router(self) -> RouterConnection:
        if self._waiting.n >= MAX_HELD_REQUESTS and not self._client.has_started:
            raise RequestFailed("The server is being restarted.")
        hold_s = self._router.hold_timeout_s if self._request.is_work else PROBE_HOLD_S
        end_s = time.monotonic() + hold_s
        self._waiting.n += 1
        try:
            while True:
                await asyncio.sleep(RETRY_S)
                try:
                    return await self._open()
                except RouterAway as away:
                    if time.monotonic() > end_s:
                        cause = away.__cause__ or "there is none"
                        logger.warning("no router for %g s: %s", hold_s, cause)
                        raise RequestFailed("The server is being restarted.") from None
        finally:
            self._waiting.n -= 1

    async def _open(self) -> RouterConnection:
        """Connect in the sender's turn; probes need none. Raises RouterAway."""
        if self._request.is_work:
            self._turn = await self._take_turn()
        has_body, is_open = not self._request.is_head, False
        try:
            router = self._chosen_router()
            connection = await self._pool.open(
                RouterKey(router.address, router.tls),
                has_body=has_body,
                is_new=self._needs_new_connection or not self._request.is_small,
            )
            is_open = True
        finally:
            if not (is_open and self._keeps_turn):
                self._release_turn()
        return connection

    def _release_turn(self) -> None:
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.release()

    def _chosen_router(self) -> RouterAddress:
        """Return where to connect to; raises RouterAway."""
        if self._choose is not None:
            router = self._choose()
            if router is None:
                raise RouterAway
            self._router = router
        return self._router

    async def _resume(self, connection: RouterConnection, head: ResponseHead) -> None:
        if head.has_records:
            await self._relay_records(connection)
            return
        body = b"".join([part async for part in connection.parts()])
        if head.status in RETRYABLE:
            raise RouterBusy
        logger.error("A stream could not go on: %d %s", head.status, body[:200])
        raise RequestFailed("The server was restarted and could not go on with this response.")

    async def _relay_records(self, connection: RouterConnection) -> None:
        reader = RecordReader()
        async for part in connection.parts():
            frames, damage = [], None
            try:
                for record in reader.feed(part):
                    self._request.record(record.journal, is_event=record.kind == EVENT)
                    self.meter.add_output(record.n_tokens)
                    frames.append(record.frame)
            except StreamRecordError as error:
                damage = error
            if frames:  # those before the damage too: they are counted
                await self._client.write(b"".join(frames))
            if damage is not None:
                raise RouterLost from damage
        if not reader.is_between_records:
            raise RouterLost
        await self._client.end()

    async def _relay_response(self, connection: RouterConnection, head: ResponseHead) -> None:
        """Relay a response that is no stream; nothing of it is sent before all is there, if small.

        So it can be had from another router.
        """
        buffered, size = [], 0
        parts = connection.parts()
        if not head.is_event_stream:
            async for part in parts:
                buffered.append(part)
                size += len(part)
                if size > MAX_BUFFERED_BYTES:
                    break
        await self._client.start(head)
        await self._client.write(b"".join(buffered))
        async for part in parts:
            await self._client.write(part)
        await self._client.end()

    async def _commented(self, work: Awaitable[T]) -> T:
        """Return the result of work; comments keep the connection of a stream that waits."""
        if not self._client.has_started:  # nor will it before there is a result
            return await work
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({task}, timeout=COMMENT_S))[0]:
                await self._client.write(COMMENT_FRAME)
            return task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)


async def _first_of(work: Awaitable[T], sending: asyncio.Task[None]) -> T:
    """Return the result of work, or raise what sending fails with before."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task, sending}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            sending.result()
            await asyncio.wait({task})
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
