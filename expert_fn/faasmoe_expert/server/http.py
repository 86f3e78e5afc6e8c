"""What a route answers, before it becomes bytes of HTTP.

A request, as far as it has been read, and what answers one.

How much a sandbox takes in at once: what is more is refused, and sent elsewhere.

Requests are computed one after the other, so what can pile up are bodies that are not whole yet.

HTTP/1.1 requests out of a connection's bytes, with bounds on head and body.

Parsing is httptools'. A malformed request ends the reading, and with it the connection.
"""

from __future__ import annotations

import json
import time
from asyncio import Future
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import httptools

from faasmoe_contracts.shared_region import FRAME_HEADER, REGION_HEADER
from faasmoe_contracts.wire import MAX_FRAME_BYTES, Buffer
from faasmoe_expert.errors import SandboxOverloaded

FRAME_CONTENT_TYPE = "application/vnd.faasmoe.frame"


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """Status, content type and body buffers of one HTTP answer; `headers` are further lines."""

    status: int
    content_type: str
    body: Sequence[Buffer]
    close: bool = False
    headers: str = ""

    @classmethod
    def json_response(cls, status: int, value: Any) -> HttpResponse:
        """Return a JSON answer."""
        return cls(status, "application/json", [json.dumps(value).encode()])

    @classmethod
    def error_response(
        cls, status: int, code: str, message: str, *, field: str | None = None, close: bool = False
    ) -> HttpResponse:
        """Return an error object; `close` ends the connection after it."""
        value = {"error": {"code": code, "message": message, "field": field}}
        return cls(status, "application/json", [json.dumps(value).encode()], close)

    def encode_head(self, *, keep_alive: bool) -> bytes:
        """Return the status line and headers."""
        status_line = f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}\r\n"
        connection = "" if keep_alive else "connection: close\r\n"
        if self.status == HTTPStatus.NO_CONTENT:  # which has neither content nor its length
            return f"{status_line}{connection}\r\n".encode()
        size_bytes = sum(memoryview(part).nbytes for part in self.body)
        return (
            f"{status_line}content-type: {self.content_type}\r\n"
            f"content-length: {size_bytes}\r\n{self.headers}{connection}\r\n"
        ).encode()


@dataclass(slots=True)
class HttpRequest:
    """One request, as far as it has been read; `begun_s` is on the monotonic clock."""

    target: bytes = b""
    authorization: bytes = b""
    method: str = ""
    started_s: float | None = None
    sender: Hashable = None  # who is at the other end, as far as that can be told
    head_bytes: int = 0
    buffered_bytes: int = 0  # received after the packet in which it began
    body: bytearray = field(default_factory=bytearray)
    shared_frame: memoryview | None = (
        None  # a frame that lies in shared memory, in place of the body
    )
    frame_header: bytes | None = None
    region_header: bytes | None = None
    content_length: int = 0
    counted_bytes: int | None = None  # by the intake; None while the body has not begun

    @property
    def frame(self) -> Buffer:
        """The body, or what lies in shared memory in its place."""
        return self.body if self.shared_frame is None else self.shared_frame


RequestHandler = Callable[[HttpRequest], HttpResponse | Future[HttpResponse]]
"""Computes the answer of a whole request, or one to come; neither raises."""


class ReadLimits:
    """Counts the requests that are being read, and their bodies' bytes.

    Args:
        max_frames: requests with a body that are read at the same time.
        max_bytes: their bytes, together; announced ones count before they come.
    """

    def __init__(self, *, max_frames: int, max_bytes: int) -> None:
        self._max_frames = max_frames
        self._max_bytes = max_bytes
        self._n_frames = 0
        self._n_bytes = 0

    def acquire(self, n_bytes: int) -> None:
        """Take in a request whose body has, or begins with, so many bytes; raises Overloaded."""
        if self._n_frames >= self._max_frames:
            raise SandboxOverloaded(
                f"frames: got one more than the {self._max_frames} concurrent request bodies allowed",
                field="frames",
            )
        self._check_bytes(n_bytes)
        self._n_frames += 1
        self._n_bytes += n_bytes

    def extend(self, n_bytes: int) -> None:
        """Take in more of a body than was announced; raises Overloaded."""
        self._check_bytes(n_bytes)
        self._n_bytes += n_bytes

    def release(self, n_bytes: int) -> None:
        """Count a request as answered or lost, with all the bytes that were taken in of it."""
        self._n_frames -= 1
        self._n_bytes -= n_bytes

    def _check_bytes(self, n_bytes: int) -> None:
        if self._n_bytes + n_bytes > self._max_bytes:
            raise SandboxOverloaded(
                f"body: got {self._n_bytes + n_bytes} bytes in all request bodies being read, "
                f"expected at most {self._max_bytes}",
                field="body",
            )


MAX_HEAD_BYTES = 16 << 10
_FRAME_HEADER, _REGION_HEADER = FRAME_HEADER.encode(), REGION_HEADER.encode()


class HttpRequestReader:
    """Reads the requests of one connection.

    Args:
        intake: bounds what is read on all connections together.
        begun: told when a request begins.
        whole: given each request that is whole, and whether the connection stays open after it;
            the request counts as taken in until `leave` is called with it.
    """

    def __init__(
        self,
        read_limits: ReadLimits,
        *,
        on_request_start: Callable[[], None],
        on_request: Callable[[HttpRequest, bool], None],
    ) -> None:
        self._read_limits = read_limits
        self._on_request_start = on_request_start
        self._on_request = on_request
        self._request = HttpRequest()
        self._rejection: HttpResponse | None = None
        self._parser = httptools.HttpRequestParser(self)

    @property
    def is_reading(self) -> bool:
        """Tell whether a request has begun and is not whole."""
        return self._request.started_s is not None

    def feed(self, data: bytes) -> HttpResponse | None:
        """Read on; return what refuses the rest of the connection, None if nothing does."""
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
        """Count a request as answered or lost; again changes nothing."""
        if request.counted_bytes is not None:
            self._read_limits.release(request.counted_bytes)
            request.counted_bytes = None

    def close(self) -> None:
        """Count what is being read as lost."""
        self.release(self._request)

    # The parser's callbacks. One that raises ends the parse, and with it the connection.

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._request = HttpRequest(started_s=time.monotonic())
        self._on_request_start()

    def on_url(self, url: bytes) -> None:
        """Take a part of the target."""
        self._request.target += url
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one header; those of authorization and of the body matter."""
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

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._count_body(len(body))
        self._request.body += body
        if len(self._request.body) > MAX_FRAME_BYTES:
            self._abort_parse(413, "too_large", "body", got="more")

    def on_message_complete(self) -> None:
        """Hand on the request, unless it asks for another protocol."""
        request, self._request = self._request, HttpRequest()
        if self._parser.should_upgrade():  # the parser says so to who feeds it
            self.release(request)
            return
        request.method = self._parser.get_method().decode()
        self._on_request(request, self._parser.should_keep_alive())

    def _count_body(self, n_bytes: int) -> None:
        request = self._request
        try:
            if request.counted_bytes is None:
                first = max(n_bytes, request.content_length)
                self._read_limits.acquire(first)
                request.counted_bytes = first
            elif len(request.body) + n_bytes > request.counted_bytes:
                self._read_limits.extend(n_bytes)
                request.counted_bytes += n_bytes
        except SandboxOverloaded as error:
            self._rejection = HttpResponse.error_response(
                error.status, error.code, str(error), field=error.field, close=True
            )
            raise _LimitExceeded(str(error)) from error

    def _count_buffered(self, request: HttpRequest, n_bytes: int) -> None:
        """Bound what the parser holds back: it gives a header, or a trailer, only when whole.

        The framing of chunks may take as much as the body.
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
    """The parse of a request ends because a bound is exceeded."""
