"""What goes around every request: an id, a bound on its body, and an answer whatever happens."""

import logging
import string
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from faasmoe_router.api.errors import ApiError, internal_error

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "X-Request-Id"
MAX_REQUEST_ID_LENGTH = 128
_REQUEST_ID_CHARACTERS = frozenset(string.ascii_letters + string.digits + "-_.:/+=")


class RequestContextMiddleware:
    """ASGI middleware: X-Request-Id, 413 for large bodies, 500 without internals."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sender = _ResponseSender(send, _request_id_from(Headers(scope=scope)))
        try:
            if _content_length(scope) > self._max_body_bytes:
                response = _body_too_large(self._max_body_bytes).response()
                await response(scope, receive, sender.send)
            else:
                await self._app(scope, _BoundedReceive(receive, self._max_body_bytes), sender.send)
        except Exception:
            if sender.has_started:
                raise  # the server cuts the connection, which is all that can still be told
            logger.exception("Request %s failed", sender.request_id)
            await internal_error().response()(scope, receive, sender.send)


class _ResponseSender:
    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self.request_id = request_id
        self.has_started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_started = True
            MutableHeaders(scope=message)[REQUEST_ID_HEADER] = self.request_id
        await self._send(message)


class _BoundedReceive:
    """A receive function that counts, for bodies that do not declare their length."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._received_bytes = 0

    async def __call__(self) -> Message:
        message = await self._receive()
        self._received_bytes += len(message.get("body", b""))
        if self._received_bytes > self._max_bytes:
            raise HTTPException(413, str(_body_too_large(self._max_bytes)))
        return message


def _body_too_large(max_bytes: int) -> ApiError:
    return ApiError(
        f"The body of your request is too large: at most {max_bytes} bytes are read.",
        status=413,
        code="request_too_large",
    )


def _content_length(scope: Scope) -> int:
    declared = Headers(scope=scope).get("content-length", "0")
    return int(declared) if declared.isdecimal() else 0


def _request_id_from(headers: Headers) -> str:
    client_request_id = headers.get(REQUEST_ID_HEADER, "")
    if 0 < len(client_request_id) <= MAX_REQUEST_ID_LENGTH and _REQUEST_ID_CHARACTERS.issuperset(
        client_request_id
    ):
        return client_request_id
    return uuid.uuid4().hex
