"""A connection to a router: sends a request, reads its response; over TCP, then the next one's."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

import httptools

from faasmoe_contracts.socket_address import (
    open_connection,
    set_ack_timeout,
    split_host_port,
    write,
)
from faasmoe_contracts.stream_records import DRAINING_HEADER, PREPARED_STATUS, RECORDS_HEADER
from faasmoe_contracts.tls import TlsPeer
from faasmoe_gateway.held_request import HeldRequest

READ_BYTES = 64 << 10
CONNECT_TIMEOUT_S = 1.0  # of a pod whose node is gone nobody says so
TLS_CONNECT_TIMEOUT_S = 5.0  # in which the router's event loop must answer
KEPT_ACK_TIMEOUT_S = 5.0  # as CONNECT_TIMEOUT_S: in which the pod's system must take what was sent
_FIRST_FINAL_STATUS = 200


class RouterAway(Exception):
    """No router listens."""


class RouterLost(Exception):
    """The connection ended before the response did."""


class KeptConnectionLost(RouterLost):
    """A connection that was kept from an earlier request ended before anything of the response."""


@dataclass(slots=True)
class ResponseHead:
    """Status and headers of a response.

    Attributes:
        status: the HTTP status.
        headers: lower-case names and values.
    """

    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)

    @property
    def has_records(self) -> bool:
        """Whether the body is records of a stream."""
        return any(name == RECORDS_HEADER.encode() for name, _ in self.headers)

    @property
    def is_draining(self) -> bool:
        """Whether the router refuses because it is ending."""
        return any(name == DRAINING_HEADER.encode() for name, _ in self.headers)

    @property
    def is_event_stream(self) -> bool:
        """Whether the body is server-sent events."""
        types = (value for name, value in self.headers if name == b"content-type")
        return any(t.partition(b";")[0].strip().lower() == b"text/event-stream" for t in types)


class RouterConnection:
    """A connection for one request; `next` returns it for another one.

    Args:
        reader: reads from the router.
        writer: writes to it.
        has_body: whether the response has a body; False for HEAD.
        opened_s: loop time at which it was opened, in seconds.
        asks_to_stay: whether the router is to keep it after the response.
        is_kept: whether requests were answered over it before.

    Attributes:
        on_prepared: called when the router says that it has prepared the request.
        opened_s: loop time at which it was opened, in seconds.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        has_body: bool,
        opened_s: float,
        asks_to_stay: bool = False,
        is_kept: bool = False,
    ) -> None:
        self.on_prepared: Callable[[], None] = lambda: None
        self.opened_s = opened_s
        self._reader = reader
        self._writer = writer
        self._has_body = has_body
        self._asks_to_stay = asks_to_stay
        self._is_kept = is_kept
        self._ahead: asyncio.Task[bytes] | None = None  # reads while there is no request
        self._parser = httptools.HttpResponseParser(self)
        self._reading = ResponseHead()
        self._head: ResponseHead | None = None
        self._parts: deque[bytes] = deque()
        self._has_answer = False
        self._is_sent = False
        self._is_complete = False
        self._stays_open = False

    @classmethod
    async def open(cls, address: str, *, has_body: bool, tls: TlsPeer | None = None) -> Self:
        """Connect to the router; raises RouterAway.

        Args:
            address: where it listens.
            has_body: whether the response has a body; False for HEAD.
            tls: how it is known over TCP; None connects without TLS.
        """
        try:
            async with asyncio.timeout(TLS_CONNECT_TIMEOUT_S if tls else CONNECT_TIMEOUT_S):
                reader, writer = await open_connection(address, limit=READ_BYTES, tls=tls)
        except OSError as error:  # TimeoutError too
            raise RouterAway from error
        return cls(
            reader,
            writer,
            has_body=has_body,
            opened_s=asyncio.get_running_loop().time(),
            # A Unix socket costs little to open, and may have got another listener. After a HEAD
            # the parser waits for the body.
            asks_to_stay=split_host_port(address) is not None and has_body,
        )

    @property
    def can_be_kept(self) -> bool:
        """Whether request and response are complete, and the router takes another request."""
        is_answered = self._is_sent and self._is_complete and self._stays_open
        return is_answered and not self._writer.transport.is_closing()

    def keep(self, on_end: Callable[[], None]) -> None:
        """Wait for another request.

        Args:
            on_end: called if the router ends the connection before, or sends what nobody asked for.
        """
        self._ahead = asyncio.create_task(self._reader.read(READ_BYTES))

        def end(read: asyncio.Task[bytes]) -> None:
            if not read.cancelled():
                read.exception()  # or it would be logged
            if self._ahead is read:
                on_end()

        self._ahead.add_done_callback(end)

    def next(self, *, has_body: bool) -> Self | None:
        """Return the connection for another request; None if the router has ended it.

        Args:
            has_body: whether the response has a body; False for HEAD.
        """
        ahead = self._ahead
        if ahead is None or ahead.done() or self._writer.transport.is_closing():
            return None
        set_ack_timeout(self._writer, KEPT_ACK_TIMEOUT_S)
        kept = type(self)(
            self._reader,
            self._writer,
            has_body=has_body,
            opened_s=self.opened_s,
            asks_to_stay=has_body,
            is_kept=True,
        )
        kept._ahead, self._ahead = ahead, None
        return kept

    def send_small(self, request: HeldRequest, front_token: str) -> bool:
        """Send a request at once if it is here and small; return whether it was.

        A router that has ended the connection is noticed by the reader.
        """
        content = request.small_content()
        if content is None:
            return False
        with suppress(OSError):
            write(self._writer, self._head_of(request, front_token) + content)
            self._is_sent = True
        return True

    async def send(self, request: HeldRequest, front_token: str) -> None:
        """Send a request to its end; a router that ends the connection is noticed by the reader.

        Raises:
            ClientGone: the client hung up before its end.
        """
        try:
            write(self._writer, self._head_of(request, front_token))
            async for part in request.body():
                if request.sends_chunks:
                    part = b"%x\r\n%b\r\n" % (len(part), part)
                write(self._writer, part)
                await self._writer.drain()
            if request.sends_chunks:
                write(self._writer, b"0\r\n\r\n")
            await self._writer.drain()
            self._is_sent = True
        except OSError:
            return

    async def read_head(self) -> ResponseHead:
        """Return the head of the response; raises RouterLost."""
        while self._head is None:
            await self._read()
        return self._head

    async def parts(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives; raises RouterLost if it has no end."""
        while True:
            while self._parts:
                yield self._parts.popleft()
            if self._is_complete:
                return
            await self._read()

    def close(self) -> None:
        """Close the connection, which ends the request if it is not complete."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.cancel()
        self._writer.transport.abort()

    def _head_of(self, request: HeldRequest, front_token: str) -> bytes:
        return request.head(front_token, stays_open=self._asks_to_stay)

    async def _read(self) -> None:
        ahead, self._ahead = self._ahead, None
        try:
            data = await (self._reader.read(READ_BYTES) if ahead is None else ahead)
            if not data:
                raise self._lost()
            self._has_answer = True
            self._parser.feed_data(data)
        except (OSError, httptools.HttpParserError) as error:
            raise self._lost() from error

    def _lost(self) -> RouterLost:
        return KeptConnectionLost() if self._is_kept and not self._has_answer else RouterLost()

    def on_message_begin(self) -> None:
        """Note what follows the response, which nobody asked for."""
        if self._is_complete:
            self._stays_open = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header."""
        self._reading.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Take over the head, unless it is an interim response."""
        if self._is_complete:  # it follows the response
            return
        self._reading.status = self._parser.get_status_code()
        if self._reading.status == PREPARED_STATUS:
            self.on_prepared()
        if self._reading.status >= _FIRST_FINAL_STATUS:
            self._head = self._reading
            self._is_complete = not self._has_body
            self._stays_open = self._asks_to_stay and self._parser.should_keep_alive()
        self._reading = ResponseHead()

    def on_body(self, body: bytes) -> None:
        """Collect a part of the body."""
        if not self._is_complete:
            self._parts.append(body)

    def on_message_complete(self) -> None:
        """Note the end of the response."""
        self._is_complete = self._head is not None
