"""Streams that go on in this router after another one has died.

A front (`faasmoe_contracts.stream_records`) shows its token with each request and gets streams as
records. It sends a request whose router has died again, with the journal that the records made up.
The middleware takes the journal off the body; the request then takes the same way as any other, up
to the generation, which repeats the journal's tokens. Frames that the client has are left out.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from faasmoe_contracts.stream_records import (
    COMMENT,
    EVENT,
    FRONT_HEADER,
    JOURNAL_HEADER,
    ORIGIN_HEADER,
    TENANT_HEADER,
    StreamRecordError,
    pack_record,
    parse_journal_header,
    parse_origin_header,
)
from faasmoe_contracts.tls import GATEWAY_NAME
from faasmoe_gateway.http_protocol import PEER_NAMES_EXTENSION, PREPARED_EXTENSION
from faasmoe_router.api.errors import ApiError
from faasmoe_router.api.origin import Origin
from faasmoe_router.engine.generation import CompletionOutput
from faasmoe_router.engine.journal import JournalEntry, JournalError

MAX_JOURNAL_BYTES = 64 << 20
INTERNAL_HEADERS = (FRONT_HEADER, JOURNAL_HEADER, ORIGIN_HEADER, TENANT_HEADER)


@dataclass(frozen=True, slots=True)
class Resumption:
    """What a stream has told its front.

    Attributes:
        origin: of its ids, seed and time.
        entries: its outputs.
        n_frames: frames that the client has.
    """

    origin: Origin
    entries: Sequence[JournalEntry]
    n_frames: int

    @classmethod
    def loads(cls, journal: bytes, n_frames: int) -> Resumption:
        """Return what a journal says; raises JournalError."""
        first, *lines = journal.splitlines()
        try:
            nonce, created_s = json.loads(first)
            origin = Origin(str(nonce), int(created_s))
        except (ValueError, TypeError, RecursionError) as error:
            raise JournalError("the journal does not begin with an origin") from error
        return cls(origin, [JournalEntry.loads(line) for line in lines], n_frames)


class StreamJournal:
    """Writes the journal of one stream into its records.

    Args:
        origin: of its ids, seed and time.
        resumption: what its front knows already; None if it is new.
    """

    def __init__(self, origin: Origin, resumption: Resumption | None) -> None:
        self._n_known_entries = 0 if resumption is None else len(resumption.entries)
        self._n_known_frames = 0 if resumption is None else resumption.n_frames
        self._pending = b""
        self._n_tokens = 0
        if resumption is None:
            self._pending = json.dumps([origin.nonce, origin.created_s]).encode() + b"\n"

    async def watch(
        self, outputs: AsyncIterable[tuple[int, CompletionOutput]]
    ) -> AsyncIterator[tuple[int, CompletionOutput]]:
        """Yield the outputs of a stream; those that the front does not know are journalled."""
        async for index, output in outputs:
            if self._n_known_entries:
                self._n_known_entries -= 1
            elif output.progress.token_ids:
                n_cached, n_written = output.n_cached_tokens, output.n_cache_written_tokens
                entry = JournalEntry(index, output.progress, n_cached, n_written)
                self._pending += entry.dumps()
                self._n_tokens += output.n_tokens
            yield index, output

    async def records(self, frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Yield a record for each frame that the client does not have yet."""
        async for frame in frames:
            if self._n_known_frames:
                self._n_known_frames -= 1
                continue
            journal, self._pending = self._pending, b""
            n_tokens, self._n_tokens = self._n_tokens, 0
            yield pack_record(EVENT, journal, frame, n_tokens)


def comment_record(frame: bytes) -> bytes:
    """Return the record of a comment, which a resumed stream does not count."""
    return pack_record(COMMENT, b"", frame)


def has_front(request: Request) -> bool:
    """Return whether a request comes from a front, which reads streams as records."""
    return bool(getattr(request.state, "has_front", False))


def tell_prepared(request: Request) -> None:
    """Tell the front that its request is prepared, so that it hands on the sender's next one."""
    if has_front(request):
        request.scope.get("extensions", {}).get(PREPARED_EXTENSION, lambda: None)()


def get_front_tenant(scope: Scope) -> str | None:
    """Return the tenant whose key a front has verified; None if it leaves that to the router."""
    tenant: str | None = scope.get("state", {}).get("front_tenant")
    return tenant


def get_resumption(request: Request) -> Resumption | None:
    """Return what a request goes on with; None if it is new."""
    resumption = getattr(request.state, "resumption", None)
    assert resumption is None or isinstance(resumption, Resumption)
    return resumption


def is_resumed(scope: Scope) -> bool:
    """Return whether the request of an ASGI connection was admitted by another router already."""
    return scope.get("state", {}).get("resumption") is not None


class ResumptionMiddleware:
    """ASGI middleware that recognizes a front and takes the journal off a body.

    Args:
        app: the wrapped ASGI app.
        front_token: what a front shows; empty if there is none.
    """

    def __init__(self, app: ASGIApp, *, front_token: str) -> None:
        self._app = app
        self._front_token = front_token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        headers = Headers(scope=scope) if scope["type"] == "http" else Headers()
        if not any(name in headers for name in INTERNAL_HEADERS):
            await self._app(scope, receive, send)
            return
        shown = headers.get(FRONT_HEADER, "").encode()
        is_front = bool(self._front_token) and hmac.compare_digest(shown, self._front_token)
        if not is_front or not _has_front_certificate(scope):
            await _not_a_front().response()(scope, receive, send)
            return
        state: dict[str, Any] = {**scope.get("state", {}), "has_front": True}
        if TENANT_HEADER in headers:
            state["front_tenant"] = headers[TENANT_HEADER]
        inner = {**scope, "state": state, "headers": _without_internal(scope)}
        try:
            if ORIGIN_HEADER in headers:
                state["origin"] = Origin(*parse_origin_header(headers[ORIGIN_HEADER]))
            if JOURNAL_HEADER in headers:
                n_bytes, n_frames = parse_journal_header(headers[JOURNAL_HEADER])
                journal, rest = await _read_journal(receive, n_bytes)
                resumption = Resumption.loads(journal, n_frames)
        except (StreamRecordError, JournalError) as error:
            await invalid_journal(error).response()(scope, receive, send)
            return
        if JOURNAL_HEADER not in headers:
            await self._app(inner, receive, send)
            return
        state |= {"resumption": resumption, "origin": resumption.origin}
        _subtract_length(inner, n_bytes)
        await self._app(inner, _MessageThenReceive(rest, receive), send)


def _has_front_certificate(scope: Scope) -> bool:
    """Return whether a client has shown a gateway's certificate, if there is TLS."""
    names = scope.get("extensions", {}).get(PEER_NAMES_EXTENSION)
    return names is None or GATEWAY_NAME in names


def invalid_journal(error: Exception) -> ApiError:
    """Return the error for a journal that does not fit its request."""
    return ApiError(f"This stream cannot go on here: {error}", code="invalid_journal")


def _not_a_front() -> ApiError:
    return ApiError(
        f"{', '.join(INTERNAL_HEADERS)} are for the gateway of this server.",
        status=403,
        code="not_a_gateway",
    )


def _without_internal(scope: Scope) -> list[tuple[bytes, bytes]]:
    internal = [name.encode() for name in INTERNAL_HEADERS]
    return [(name, value) for name, value in scope["headers"] if name not in internal]


def _subtract_length(scope: Scope, n_bytes: int) -> None:
    headers = MutableHeaders(scope=scope)
    if "content-length" in headers:
        headers["content-length"] = str(max(0, int(headers["content-length"]) - n_bytes))


async def _read_journal(receive: Receive, n_bytes: int) -> tuple[bytes, Message]:
    """Return the first bytes of a body, and the message with what follows them."""
    if not 0 < n_bytes <= MAX_JOURNAL_BYTES:
        raise JournalError(f"got a journal of {n_bytes} bytes, expected up to {MAX_JOURNAL_BYTES}")
    body = bytearray()
    while len(body) < n_bytes:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise JournalError("the front hung up")
        body += message.get("body", b"")
        if not message.get("more_body", False) and len(body) < n_bytes:
            raise JournalError(f"got {len(body)} bytes, expected a journal of {n_bytes}")
    more = message.get("more_body", False)
    rest = {"type": "http.request", "body": bytes(body[n_bytes:]), "more_body": more}
    return bytes(body[:n_bytes]), rest


class _MessageThenReceive:
    """An ASGI receive callable that begins with a message received before."""

    def __init__(self, message: Message, receive: Receive) -> None:
        self._first: Message | None = message
        self._receive = receive

    async def __call__(self) -> Message:
        message, self._first = self._first, None
        return await self._receive() if message is None else message
