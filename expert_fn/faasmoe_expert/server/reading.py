"""HTTP/1.1 requests out of a connection's bytes, with bounds on head and body.

Parsing is httptools'. A malformed request ends the reading, and with it the connection.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import httptools

from faasmoe_expert.errors import Overloaded
from faasmoe_expert.server.answer import Answer
from faasmoe_expert.server.intake import Intake
from faasmoe_expert.server.request import HttpRequest
from faasmoe_expert.shared_region import FRAME_HEADER, REGION_HEADER
from faasmoe_expert.wire import MAX_FRAME_BYTES

MAX_HEAD_BYTES = 16 << 10
_FRAME, _REGION = FRAME_HEADER.encode(), REGION_HEADER.encode()


class RequestReader:
    """Reads the requests of one connection.

    Args:
        intake: bounds what is read on all connections together.
        begun: told when a request begins.
        whole: given each request that is whole, and whether the connection stays open after it;
            the request counts as taken in until `leave` is called with it.
    """

    def __init__(
        self,
        intake: Intake,
        *,
        begun: Callable[[], None],
        whole: Callable[[HttpRequest, bool], None],
    ) -> None:
        self._intake = intake
        self._begun = begun
        self._whole = whole
        self._request = HttpRequest()
        self._refusal: Answer | None = None
        self._parser = httptools.HttpRequestParser(self)

    @property
    def is_reading(self) -> bool:
        """Tell whether a request has begun and is not whole."""
        return self._request.begun_s is not None

    def feed(self, data: bytes) -> Answer | None:
        """Read on; return what refuses the rest of the connection, None if nothing does."""
        request = self._request
        try:
            self._parser.feed_data(data)
            if self._request is request and request.begun_s is not None:
                self._count(request, len(data))
        except httptools.HttpParserUpgrade:
            message = "upgrade: got another protocol, expected HTTP/1.1"
            return Answer.of_error(400, "bad_request", message, field="upgrade")
        except (httptools.HttpParserError, _Stopped) as error:
            refusal = Answer.of_error(400, "bad_request", f"request: not HTTP/1.1 ({error})")
            return self._refusal or refusal
        return None

    def leave(self, request: HttpRequest) -> None:
        """Count a request as answered or lost; again changes nothing."""
        if request.taken_bytes is not None:
            self._intake.end(request.taken_bytes)
            request.taken_bytes = None

    def close(self) -> None:
        """Count what is being read as lost."""
        self.leave(self._request)

    # The parser's callbacks. One that raises ends the parse, and with it the connection.

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._request = HttpRequest(begun_s=time.monotonic())
        self._begun()

    def on_url(self, url: bytes) -> None:
        """Take a part of the target."""
        self._request.target += url
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one header; those of authorization and of the body matter."""
        self._count_head(len(name) + len(value))
        name = name.lower()
        if name == b"content-length" and value.isdigit():
            self._request.announced_bytes = int(value)
            if int(value) > MAX_FRAME_BYTES:
                self._stop_parse(413, "too_large", "body", got=f"{int(value)} bytes")
        elif name == b"authorization":
            self._request.authorization = value
        elif name == _FRAME:
            self._request.shared_place = value
        elif name == _REGION:
            self._request.shared_offer = value

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._enter_intake(len(body))
        self._request.body += body
        if len(self._request.body) > MAX_FRAME_BYTES:
            self._stop_parse(413, "too_large", "body", got="more")

    def on_message_complete(self) -> None:
        """Hand on the request, unless it asks for another protocol."""
        request, self._request = self._request, HttpRequest()
        if self._parser.should_upgrade():  # the parser says so to who feeds it
            self.leave(request)
            return
        request.method = self._parser.get_method().decode()
        self._whole(request, self._parser.should_keep_alive())

    def _enter_intake(self, n_bytes: int) -> None:
        request = self._request
        try:
            if request.taken_bytes is None:
                first = max(n_bytes, request.announced_bytes)
                self._intake.begin(first)
                request.taken_bytes = first
            elif len(request.body) + n_bytes > request.taken_bytes:
                self._intake.grow(n_bytes)
                request.taken_bytes += n_bytes
        except Overloaded as error:
            self._refusal = Answer.of_error(
                error.status, error.code, str(error), field=error.field, close=True
            )
            raise _Stopped(str(error)) from error

    def _count(self, request: HttpRequest, n_bytes: int) -> None:
        """Bound what the parser holds back: it gives a header, or a trailer, only when whole.

        The framing of chunks may take as much as the body.
        """
        request.later_bytes += n_bytes
        if request.later_bytes > MAX_HEAD_BYTES + 2 * len(request.body):
            self._stop_parse(431, "head_too_large", "head", got="more")

    def _count_head(self, n_bytes: int) -> None:
        self._request.head_bytes += n_bytes
        if self._request.head_bytes > MAX_HEAD_BYTES:
            self._stop_parse(431, "head_too_large", "head", got="more")

    def _stop_parse(self, status: int, code: str, part: str, *, got: str) -> None:
        limit = MAX_HEAD_BYTES if part == "head" else MAX_FRAME_BYTES
        message = f"{part}: got {got}, expected at most {limit} bytes"
        self._refusal = Answer.of_error(status, code, message, field=part, close=True)
        raise _Stopped(message)


class _Stopped(Exception):
    """The parse of a request ends because a bound is exceeded."""
