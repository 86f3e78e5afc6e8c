"""ASGI middleware: request context outermost, then API key authentication and tenant paths.

Request context is a request ID, a body size limit, and a 500 response for unhandled exceptions; as
the outermost middleware it also covers its own errors and those of authentication. The log of a
failure names the ID that the client received.

Requests per minute are counted here, before anything of a body is read: a refused request counts,
and its refusal costs nothing.

Authentication: `/v1/...` accepts the key of any tenant; `/{tenant}/v1/...` accepts only that
tenant's keys and is rewritten to `/v1/...`, so both are served by the same routes. Every failure
(no key, a wrong or revoked one, another tenant's, an unknown tenant) gets the same response in the
same time, so that neither keys nor tenant names can be probed.
"""

from __future__ import annotations

import logging
import re
import string
import uuid
from typing import Protocol

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from faasmoe_gateway.connections import KNOWN_CLIENT_EXTENSION
from faasmoe_router.api.errors import (
    ApiError,
    body_too_large,
    error_response,
    from_router_error,
    internal_error,
)
from faasmoe_router.api.openapi import UNAUTHENTICATED_PATHS
from faasmoe_router.api.request_span import scope_span
from faasmoe_router.api.resumption import get_front_tenant, is_resumed
from faasmoe_router.errors import RateLimitExceeded
from faasmoe_router.tenants.service import ANONYMOUS, Caller

logger = logging.getLogger(__name__)


REQUEST_ID_HEADER = "X-Request-Id"
MAX_REQUEST_ID_LENGTH = 128
_REQUEST_ID_CHARACTERS = frozenset(string.ascii_letters + string.digits + "-_.:/+=")


class RequestContextMiddleware:
    """ASGI middleware that adds X-Request-Id, answers 413 to large bodies, and 500 to failures.

    Args:
        app: the wrapped ASGI app.
        max_body_bytes: the largest accepted body, declared or received.
    """

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sender = _ResponseSender(send, _request_id_from(Headers(scope=scope)))
        try:
            if _content_length(scope) > self._max_body_bytes:
                error = body_too_large(self._max_body_bytes)
                response = error_response(scope["path"], error)
                await response(scope, receive, sender.send)
            else:
                await self._app(scope, _BoundedReceive(receive, self._max_body_bytes), sender.send)
        except Exception:
            if sender.has_started:
                raise  # too late for an error response: the server closes the connection
            logger.exception("Request %s failed", sender.request_id)
            await error_response(scope["path"], internal_error())(scope, receive, sender.send)


class _ResponseSender:
    """An ASGI send callable that adds the request ID to the response's headers."""

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
    """An ASGI receive callable that limits bodies without a Content-Length header."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._received_bytes = 0

    async def __call__(self) -> Message:
        message = await self._receive()
        self._received_bytes += len(message.get("body", b""))
        if self._received_bytes > self._max_bytes:
            raise HTTPException(413, str(body_too_large(self._max_bytes)))
        return message


def _content_length(scope: Scope) -> int:
    declared = Headers(scope=scope).get("content-length", "0")
    return int(declared) if declared.isdecimal() else 0


def _request_id_from(headers: Headers) -> str:
    """Return the client's request ID if it is usable, else a new one."""
    client_request_id = headers.get(REQUEST_ID_HEADER, "")
    if 0 < len(client_request_id) <= MAX_REQUEST_ID_LENGTH and _REQUEST_ID_CHARACTERS.issuperset(
        client_request_id
    ):
        return client_request_id
    return uuid.uuid4().hex


_TENANT_PATH_PATTERN = re.compile(r"/([^/]+)(/v1(?:/.*)?)", re.DOTALL)


class Authenticator(Protocol):
    """Maps API keys to callers."""

    def authenticate(self, tenant: str | None, api_key: str) -> Caller | None:
        """Return the owner of a key; None if the key is invalid or not of `tenant`, if given."""

    def caller(self, tenant: str) -> Caller | None:
        """Return the caller of a tenant whose key was verified; None if there is no such tenant."""

    def count_request(self, caller: Caller) -> None:
        """Count a request against its caller's limit; raises RateLimitExceeded."""


class AuthMiddleware:
    """ASGI middleware that rejects invalid API keys and sets `request.state.caller`."""

    def __init__(self, app: ASGIApp, *, authenticator: Authenticator) -> None:
        self._app = app
        self._authenticator = authenticator

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http" or scope["path"] in UNAUTHENTICATED_PATHS:
            await self._app(scope, receive, send)
            return
        tenant, path = split_tenant_path(scope["path"])
        with scope_span(scope).child("auth"):
            caller = self._identify(scope, tenant)
        if caller is None:
            await error_response(path, _invalid_api_key())(scope, receive, send)
            return
        mark_known = scope.get("extensions", {}).get(KNOWN_CLIENT_EXTENSION)
        if mark_known is not None:
            mark_known()
        if scope["method"] == "POST" and not is_resumed(scope):
            try:
                self._authenticator.count_request(caller)
            except RateLimitExceeded as error:
                await error_response(path, from_router_error(error))(scope, receive, send)
                return
        state = {**scope.get("state", {}), "caller": caller}
        tenant_scope = {**scope, "path": path, "raw_path": path.encode(), "state": state}
        await self._app(tenant_scope, receive, send)

    def _identify(self, scope: Scope, tenant: str | None) -> Caller | None:
        if (verified := get_front_tenant(scope)) is not None:
            return self._authenticator.caller(verified)
        return self._authenticator.authenticate(tenant, _bearer_token(Headers(scope=scope)))


def get_caller(request: Request) -> Caller:
    """Return the authenticated caller; ANONYMOUS in a router without tenants."""
    caller = getattr(request.state, "caller", ANONYMOUS)
    assert isinstance(caller, Caller)
    return caller


def _invalid_api_key() -> ApiError:
    return ApiError(
        "Incorrect API key provided. Send one of your tenant's keys in the header "
        "'Authorization: Bearer KEY'.",
        status=401,
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def split_tenant_path(path: str) -> tuple[str | None, str]:
    """Return the tenant that a path names, or None, and the path without it."""
    if path == "/v1" or path.startswith("/v1/"):
        return None, path
    match = _TENANT_PATH_PATTERN.fullmatch(path)
    return (None, path) if match is None else (match[1], match[2])


def _bearer_token(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip()
    return headers.get("x-api-key", "").strip()  # Anthropic's clients
