"""One connection to a router: sends a request, reads its response."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Self

import httptools

from faasmoe_contracts.socket_address import open_connection, write
from faasmoe_contracts.stream_records import DRAINING_HEADER, PREPARED_STATUS, RECORDS_HEADER
from faasmoe_contracts.tls import TlsPeer
from faasmoe_gateway.held_request import HeldRequest

READ_BYTES = 64 << 10
CONNECT_TIMEOUT_S = 1.0  # of a pod whose node is gone nobody says so
TLS_CONNECT_TIMEOUT_S = 5.0  # in which the router's event loop must answer
_FIRST_FINAL_STATUS = 200


class RouterAway(Exception):
    """No router listens."""


class RouterLost(Exception):
    """The connection ended before the response did."""


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
    """A connection for one request.

    Args:
        reader: reads from the router.
        writer: writes to it.
        has_body: whether the response has a body; False for HEAD.

    Attributes:
        on_prepared: called when the router says that it has prepared the request.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, has_body: bool
    ) -> None:
        self.on_prepared: Callable[[], None] = lambda: None
        self._reader = reader
        self._writer = writer
        self._has_body = has_body
        self._parser = httptools.HttpResponseParser(self)
        self._reading = ResponseHead()
        self._head: ResponseHead | None = None
        self._parts: deque[bytes] = deque()
        self._is_complete = False

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
        return cls(reader, writer, has_body=has_body)

    def send_small(self, request: HeldRequest, front_token: str) -> bool:
        """Send a request at once if it is here and small; return whether it was.

        A router that has ended the connection is noticed by the reader.
        """
        content = request.small_content()
        if content is None:
            return False
        with suppress(OSError):
            write(self._writer, request.head(front_token) + content)
        return True

    async def send(self, request: HeldRequest, front_token: str) -> None:
        """Send a request to its end; a router that ends the connection is noticed by the reader.

        Raises:
            ClientGone: the client hung up before its end.
        """
        try:
            write(self._writer, request.head(front_token))
            async for part in request.body():
                if request.sends_chunks:
                    part = b"%x\r\n%b\r\n" % (len(part), part)
                write(self._writer, part)
                await self._writer.drain()
            if request.sends_chunks:
                write(self._writer, b"0\r\n\r\n")
            await self._writer.drain()
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
        self._writer.transport.abort()

    async def _read(self) -> None:
        try:
            data = await self._reader.read(READ_BYTES)
            if not data:
                raise RouterLost
            self._parser.feed_data(data)
        except (OSError, httptools.HttpParserError) as error:
            raise RouterLost from error

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect a header."""
        self._reading.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """Take over the head, unless it is an interim response."""
        self._reading.status = self._parser.get_status_code()
        if self._reading.status == PREPARED_STATUS:
            self.on_prepared()
        if self._reading.status >= _FIRST_FINAL_STATUS:
            self._head = self._reading
            self._is_complete = not self._has_body
        self._reading = ResponseHead()

    def on_body(self, body: bytes) -> None:
        """Collect a part of the body."""
        self._parts.append(body)

    def on_message_complete(self) -> None:
        """Note the end of the response."""
        self._is_complete = self._head is not None
