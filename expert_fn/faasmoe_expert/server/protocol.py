"""HTTP/1.1 on one connection: bytes in, a route's answer out.

Requests are computed in the event loop's own thread, one after the other: a sandbox has its cores
for one frame at a time, so a queue of threads would only add hops. Parsing is httptools'; bounds on
head, body and time are here. A malformed request ends its connection, never the sandbox.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import httptools

from faasmoe_expert.server.answer import Answer
from faasmoe_expert.wire import MAX_FRAME_BYTES

MAX_HEAD_BYTES = 16 << 10
REQUEST_TIMEOUT_S = 30.0  # from the first byte of a request to its last


@dataclass(slots=True)
class HttpRequest:
    """One request, as far as it has been read."""

    target: bytes = b""
    authorization: bytes = b""
    method: str = ""
    head_bytes: int = 0
    body: bytearray = field(default_factory=bytearray)


class HttpProtocol(asyncio.Protocol):
    """One client connection.

    Args:
        handle: computes the answer of a whole request; must not raise.
        connections: the server's open connections; this one adds and removes itself.
    """

    def __init__(
        self, handle: Callable[[HttpRequest], Answer], connections: set[HttpProtocol]
    ) -> None:
        self._handle = handle
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._refusal: Answer | None = None
        self._request = HttpRequest()
        self._parser = httptools.HttpRequestParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to listen to a client."""
        self._transport = cast(asyncio.Transport, transport)
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget a client that left."""
        self._connections.discard(self)
        self._stop_timer()

    def data_received(self, data: bytes) -> None:
        """Feed the parser; what it completes is answered at once."""
        if self._deadline is None:
            loop = asyncio.get_running_loop()
            self._deadline = loop.call_later(REQUEST_TIMEOUT_S, self._give_up)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._refuse(Answer.of_error(400, "bad_request", "upgrade: not supported"))
        except httptools.HttpParserError as error:
            refusal = Answer.of_error(400, "bad_request", f"request: not HTTP/1.1 ({error})")
            self._refuse(self._refusal or refusal)

    def close(self) -> None:
        """End the connection once what was written is sent."""
        if self._transport is not None:
            self._transport.close()

    # The parser's callbacks. One that raises ends the parse, and with it the connection.

    def on_url(self, url: bytes) -> None:
        """Take a part of the target."""
        self._request.target += url
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one header; only the authorization matters."""
        self._count_head(len(name) + len(value))
        if name.lower() == b"authorization":
            self._request.authorization = value
        if name.lower() == b"content-length" and int(value) > MAX_FRAME_BYTES:
            self._stop_parse(
                413,
                "too_large",
                f"body: got {int(value)} bytes, expected at most {MAX_FRAME_BYTES}",
            )

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        if len(self._request.body) + len(body) > MAX_FRAME_BYTES:
            self._stop_parse(
                413,
                "too_large",
                f"body: got more than {MAX_FRAME_BYTES} bytes, expected at most that",
            )
        self._request.body += body

    def on_message_complete(self) -> None:
        """Answer the request."""
        self._stop_timer()
        request, self._request = self._request, HttpRequest()
        request.method = self._parser.get_method().decode()
        self._write(self._handle(request), keep_alive=self._parser.should_keep_alive())

    def _count_head(self, n_bytes: int) -> None:
        self._request.head_bytes += n_bytes
        if self._request.head_bytes > MAX_HEAD_BYTES:
            self._stop_parse(
                431, "head_too_large", f"head: expected at most {MAX_HEAD_BYTES} bytes"
            )

    def _stop_parse(self, status: int, code: str, message: str) -> None:
        self._refusal = Answer.of_error(status, code, message, close=True)
        raise ValueError(message)

    def _write(self, answer: Answer, *, keep_alive: bool) -> None:
        assert self._transport is not None
        stay = keep_alive and not answer.close
        if self._transport.is_closing():
            return
        self._transport.writelines([answer.head(keep_alive=stay), *answer.body])
        if not stay:
            self._transport.close()

    def _refuse(self, answer: Answer) -> None:
        self._stop_timer()
        self._write(answer, keep_alive=False)

    def _give_up(self) -> None:
        message = f"request: not whole after {REQUEST_TIMEOUT_S:.0f} s"
        self._refuse(Answer.of_error(408, "request_timeout", message))

    def _stop_timer(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
