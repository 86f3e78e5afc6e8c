"""HTTP/1.1 requests and responses: parsing with httptools, and limits on what is read.

Bounds the head and body of each request, and the bodies being read on all connections together.
Requests are computed one after the other, so only incomplete bodies can pile up. A malformed or
oversized request closes its connection. Knows nothing of sockets or routes.
"""

from __future__ import annotations

import json
import time
from asyncio import Future
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Protocol

import httptools

from faasmoe_contracts.shared_region import FRAME_HEADER, REGION_HEADER
from faasmoe_contracts.wire import MAX_FRAME_BYTES, Buffer
from faasmoe_expert.errors import SandboxOverloaded

FRAME_CONTENT_TYPE = "application/vnd.faasmoe.frame"
MAX_HEAD_BYTES = 16 << 10
PROBE_PATHS = (b"/healthz", b"/readyz")
_FRAME_HEADER, _REGION_HEADER = FRAME_HEADER.encode(), REGION_HEADER.encode()


class HeldResource(Protocol):
    """What a client keeps at the sandbox for as long as it is connected."""

    def was_used(self) -> bool:
        """Return whether it was used since the last call, so that the connection is not idle."""

    def close(self) -> None:
        """Release it."""


class RequestConnection(Protocol):
    """The connection of a request.

    Attributes:
        peer_pid: process ID of the client if it is a Unix socket, else None.
    """

    peer_pid: int | None

    def hold(self, resource: HeldResource) -> None:
        """Close a resource with the connection, in place of an earlier one."""


@dataclass(slots=True)
class HttpRequest:
    """One request, possibly incomplete.

    Attributes:
        target: request target.
        authorization: value of the authorization header.
        method: set once the request is complete.
        started_s: when its first byte arrived, on the monotonic clock; None before.
        sender: identity of the client, see `connection.sender_identity`.
        connection: the connection; None outside a server.
        head_bytes: bytes of target and headers so far.
        buffered_bytes: bytes received after the packet in which it started.
        body: body so far.
        shared_frame: frame in shared memory that replaces the body.
        frame_header: value of the x-faasmoe-frame header.
        region_header: value of the x-faasmoe-region header.
        content_length: announced size of the body in bytes.
        counted_bytes: body bytes counted by ReadLimits; None if the body is not counted.
    """

    target: bytes = b""
    authorization: bytes = b""
    method: str = ""
    started_s: float | None = None
    sender: Hashable = None
    connection: RequestConnection | None = None
    head_bytes: int = 0
    buffered_bytes: int = 0
    body: bytearray = field(default_factory=bytearray)
    shared_frame: memoryview | None = None
    frame_header: bytes | None = None
    region_header: bytes | None = None
    content_length: int = 0
    counted_bytes: int | None = None

    @property
    def frame(self) -> Buffer:
        """The request frame: in shared memory if it is there, else the body."""
        return self.body if self.shared_frame is None else self.shared_frame


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """One HTTP response.

    Attributes:
        status: status code.
        content_type: value of the content-type header.
        body: buffers of the body, in order.
        close: whether to close the connection after it.
        headers: additional header lines, each ending in CRLF.
    """

    status: int
    content_type: str
    body: Sequence[Buffer]
    close: bool = False
    headers: str = ""

    @classmethod
    def json_response(cls, status: int, value: Any) -> HttpResponse:
        """Return a response with a JSON body."""
        return cls(status, "application/json", [json.dumps(value).encode()])

    @classmethod
    def error_response(
        cls, status: int, code: str, message: str, *, field: str | None = None, close: bool = False
    ) -> HttpResponse:
        """Return a response with an error object; `close` closes the connection after it."""
        value = {"error": {"code": code, "message": message, "field": field}}
        return cls(status, "application/json", [json.dumps(value).encode()], close)

    def encode_head(self, *, keep_alive: bool) -> bytes:
        """Return the status line and all headers."""
        status_line = f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}\r\n"
        connection = "" if keep_alive else "connection: close\r\n"
        if self.status == HTTPStatus.NO_CONTENT:  # must not have a content-length
            return f"{status_line}{connection}\r\n".encode()
        size_bytes = sum(memoryview(part).nbytes for part in self.body)
        return (
            f"{status_line}content-type: {self.content_type}\r\n"
            f"content-length: {size_bytes}\r\n{self.headers}{connection}\r\n"
        ).encode()


RequestHandler = Callable[[HttpRequest], HttpResponse | Future[HttpResponse]]
"""Returns the response to a complete request, or a future of it. Neither raises."""


class HttpRequestReader:
    """Parses the requests of one connection.

    Args:
        read_limits: limits shared by all connections.
        on_request_start: called when a request starts.
        on_request: called with each complete request and whether to keep the connection open; the
            request counts against `read_limits` until `release` is called with it.
        is_authorized: whether an `Authorization` header is that of a peer. Nothing is reserved for
            anyone else: a body without it is rejected.

    Attributes:
        is_peer: whether the last head had a peer's authorization.
        is_trusted: whether the client has shown a certificate, where that is asked for; others are
            answered on PROBE_PATHS alone.
    """

    def __init__(
        self,
        read_limits: ReadLimits,
        *,
        on_request_start: Callable[[], None],
        on_request: Callable[[HttpRequest, bool], None],
        is_authorized: Callable[[bytes], bool] = lambda _: True,
    ) -> None:
        self.is_peer = False
        self.is_trusted = True
        self._is_authorized = is_authorized
        self._read_limits = read_limits
        self._on_request_start = on_request_start
        self._on_request = on_request
        self._request = HttpRequest()
        self._rejection: HttpResponse | None = None
        self._parser = httptools.HttpRequestParser(self)

    @property
    def is_reading(self) -> bool:
        """Whether a request has started and is incomplete."""
        return self._request.started_s is not None

    def feed(self, data: bytes) -> HttpResponse | None:
        """Parse data from the client.

        Returns:
            The error response after which the connection must be closed, None if there is no error.
        """
        request = self._request
        try:
            self._parser.feed_data(data)
            if self._request is request and request.started_s is not None:
                self._count_buffered(request, len(data))
        except httptools.HttpParserUpgrade:
            message = "upgrade: got another protocol, expected HTTP/1.1"
            return HttpResponse.error_response(400, "bad_request", message, field="upgrade")
        except (httptools.HttpParserError, _LimitExceeded) as error:
            rejection = HttpResponse.error_response(
                400, "bad_request", f"request: not HTTP/1.1 ({error})"
            )
            return self._rejection or rejection
        return None

    def release(self, request: HttpRequest) -> None:
        """Stop counting a request that was answered or lost; calling it again has no effect."""
        if request.counted_bytes is not None:
            self._read_limits.release(request.counted_bytes)
            request.counted_bytes = None

    def close(self) -> None:
        """Stop counting the incomplete request; for connections that are lost."""
        self.release(self._request)

    # Callbacks of httptools. An exception in one aborts the parse and closes the connection.

    def on_message_begin(self) -> None:
        """Start a request."""
        self._request = HttpRequest(started_s=time.monotonic())
        self._on_request_start()

    def on_url(self, url: bytes) -> None:
        """Append to the request target."""
        self._request.target += url
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Record the headers that matter: authorization, content-length and shared memory."""
        self._count_head(len(name) + len(value))
        name = name.lower()
        if name == b"content-length" and value.isdigit():
            self._request.content_length = int(value)
            if int(value) > MAX_FRAME_BYTES:
                self._abort_parse(413, "too_large", "body", got=f"{int(value)} bytes")
        elif name == b"authorization":
            self._request.authorization = value
        elif name == _FRAME_HEADER:
            self._request.frame_header = value
        elif name == _REGION_HEADER:
            self._request.region_header = value

    def on_headers_complete(self) -> None:
        """Find out who sends the request, before its body."""
        if not self.is_trusted and self._request.target not in PROBE_PATHS:
            message = "certificate: got none of a peer, expected one of the operator or a router"
            self._rejection = HttpResponse.error_response(
                403, "no_certificate", message, field="certificate", close=True
            )
            raise _LimitExceeded(message)
        self.is_peer = self._is_authorized(self._request.authorization)

    def on_body(self, body: bytes) -> None:
        """Append to the body; rejects one that is not a peer's."""
        if not self.is_peer:
            message = "authorization: expected the bearer token"
            self._rejection = HttpResponse.error_response(
                401, "unauthorized", message, field="authorization", close=True
            )
            raise _LimitExceeded(message)
        self._count_body(len(body))
        self._request.body += body
        if len(self._request.body) > MAX_FRAME_BYTES:
            self._abort_parse(413, "too_large", "body", got="more")

    def on_message_complete(self) -> None:
        """Pass on the request, unless it asks for a protocol upgrade."""
        request, self._request = self._request, HttpRequest()
        if self._parser.should_upgrade():  # feed_data raises HttpParserUpgrade
            self.release(request)
            return
        request.method = self._parser.get_method().decode()
        self._on_request(request, self._parser.should_keep_alive())

    def _count_body(self, n_bytes: int) -> None:
        request = self._request
        try:
            if request.counted_bytes is None:
                announced_bytes = max(n_bytes, request.content_length)
                self._read_limits.acquire(announced_bytes)
                request.counted_bytes = announced_bytes
            elif len(request.body) + n_bytes > request.counted_bytes:
                self._read_limits.extend(n_bytes)
                request.counted_bytes += n_bytes
        except SandboxOverloaded as error:
            self._rejection = HttpResponse.error_response(
                error.status, error.code, str(error), field=error.field, close=True
            )
            raise _LimitExceeded(str(error)) from error

    def _count_buffered(self, request: HttpRequest, n_bytes: int) -> None:
        """Bound the parser's buffer: it passes on a header or trailer only when complete.

        Allows twice the body, because the framing of chunks may take as much as the body.
        """
        request.buffered_bytes += n_bytes
        if request.buffered_bytes > MAX_HEAD_BYTES + 2 * len(request.body):
            self._abort_parse(431, "head_too_large", "head", got="more")

    def _count_head(self, n_bytes: int) -> None:
        self._request.head_bytes += n_bytes
        if self._request.head_bytes > MAX_HEAD_BYTES:
            self._abort_parse(431, "head_too_large", "head", got="more")

    def _abort_parse(self, status: int, code: str, part: str, *, got: str) -> None:
        limit = MAX_HEAD_BYTES if part == "head" else MAX_FRAME_BYTES
        message = f"{part}: got {got}, expected at most {limit} bytes"
        self._rejection = HttpResponse.error_response(status, code, message, field=part, close=True)
        raise _LimitExceeded(message)


class _LimitExceeded(Exception):
    """Aborts the parse of a request that exceeds a limit."""


class ReadLimits:
    """Limits the request bodies that are being read on all connections together.

    Args:
        max_frames: maximum number of bodies.
        max_bytes: maximum number of their bytes; announced bytes count from the start.
    """

    def __init__(self, *, max_frames: int, max_bytes: int) -> None:
        self._max_frames = max_frames
        self._max_bytes = max_bytes
        self._n_frames = 0
        self._n_bytes = 0

    def acquire(self, n_bytes: int) -> None:
        """Count a body of (or starting with) `n_bytes`; raises SandboxOverloaded."""
        if self._n_frames >= self._max_frames:
            raise SandboxOverloaded(
                f"frames: got one more than the {self._max_frames} concurrent request bodies "
                "allowed",
                field="frames",
            )
        self._check_bytes(n_bytes)
        self._n_frames += 1
        self._n_bytes += n_bytes

    def extend(self, n_bytes: int) -> None:
        """Count more bytes of a body than announced; raises SandboxOverloaded."""
        self._check_bytes(n_bytes)
        self._n_bytes += n_bytes

    def release(self, n_bytes: int) -> None:
        """Stop counting a body, with all its counted bytes."""
        self._n_frames -= 1
        self._n_bytes -= n_bytes

    def _check_bytes(self, n_bytes: int) -> None:
        if self._n_bytes + n_bytes > self._max_bytes:
            raise SandboxOverloaded(
                f"body: got {self._n_bytes + n_bytes} bytes in all request bodies being read, "
                f"expected at most {self._max_bytes}",
                field="body",
            )
