"""ASGI middleware that decodes compressed request bodies, and one that answers HEAD.

A body with `Content-Encoding: gzip`, `deflate` or `zstd` is decoded in a thread, up to the same
limit as one without. Any other encoding is refused by name: its bytes would otherwise be read as
broken JSON.
"""

import asyncio
import zlib
from collections.abc import Callable, Mapping
from typing import Protocol

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from faasmoe_router.api.errors import ApiError, body_too_large, error_response, quote_input

try:
    from backports import zstd
except ModuleNotFoundError:  # then it is refused by name like any other encoding
    zstd = None

ZSTD_WINDOW_LOG_MAX = 23  # 8 MiB, which RFC 9659 lets a server expect


class _Decoder(Protocol):
    """A decoder of one body; `zlib`'s and `zstd`'s have this in common."""

    @property
    def eof(self) -> bool:
        """Whether the end of the encoded data was read."""

    def decompress(self, data: bytes, max_length: int, /) -> bytes:
        """Return at most `max_length` bytes of decoded data."""


def _new_zstd_decoder() -> _Decoder:
    limit = {zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG_MAX}
    decoder: _Decoder = zstd.ZstdDecompressor(options=limit)
    return decoder


def _new_gzip_decoder() -> _Decoder:
    return zlib.decompressobj(16 + zlib.MAX_WBITS)


_DECODERS: Mapping[str, Callable[[], _Decoder]] = {
    "gzip": _new_gzip_decoder,
    "x-gzip": _new_gzip_decoder,
    "deflate": zlib.decompressobj,
    **({} if zstd is None else {"zstd": _new_zstd_decoder}),
}
_SUPPORTED = ", ".join(name for name in _DECODERS if name != "x-gzip")
_DECODER_ERRORS = (zlib.error, *(() if zstd is None else (zstd.ZstdError,)))


class ContentEncodingMiddleware:
    """Decodes request bodies; answers 415 to unknown encodings and 413 to bombs.

    Args:
        app: the wrapped ASGI app.
        max_body_bytes: the largest accepted body after decoding.
    """

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        encoding = _content_encoding(scope)
        if encoding is None:
            await self._app(scope, receive, send)
            return
        try:
            new_decoder = _decoder(encoding)
            encoded = await _read_body(receive)
            body = await asyncio.to_thread(
                _decode, encoded, new_decoder(), max_bytes=self._max_body_bytes
            )
        except ApiError as error:
            await error_response(scope["path"], error)(scope, receive, send)
            return
        await self._app(_decoded_scope(scope, len(body)), _BodyThenReceive(body, receive), send)


def _content_encoding(scope: Scope) -> str | None:
    if scope["type"] != "http":
        return None
    encoding = Headers(scope=scope).get("content-encoding", "").strip().lower()
    return None if encoding in ("", "identity") else encoding


def _decoder(encoding: str) -> Callable[[], _Decoder]:
    new_decoder = _DECODERS.get(encoding)
    if new_decoder is None:
        raise ApiError(
            f"Unsupported Content-Encoding: got {quote_input(encoding)}, expected {_SUPPORTED} or "
            "none.",
            status=415,
            param="Content-Encoding",
            code="unsupported_content_encoding",
            headers={"Accept-Encoding": _SUPPORTED},
        )
    return new_decoder


def _decode(encoded: bytes, decoder: _Decoder, *, max_bytes: int) -> bytes:
    """Return the decoded body; raises ApiError if it is damaged or larger than `max_bytes`."""
    try:
        body = decoder.decompress(encoded, max_bytes + 1)
    except _DECODER_ERRORS as error:
        raise _damaged(str(error)) from error
    if len(body) > max_bytes:
        raise body_too_large(max_bytes)
    if not decoder.eof:
        raise _damaged("it ends early")
    return body


def _damaged(reason: str) -> ApiError:
    return ApiError(
        f"We could not decode the body of your request: {reason}.",
        param="Content-Encoding",
        code="invalid_content_encoding",
    )


async def _read_body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _decoded_scope(scope: Scope, n_bytes: int) -> Scope:
    decoded = {**scope, "headers": list(scope["headers"])}
    headers = MutableHeaders(scope=decoded)
    del headers["content-encoding"]
    headers["content-length"] = str(n_bytes)
    return decoded


class _BodyThenReceive:
    """An ASGI receive callable that returns a whole body first."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


class HeadMiddleware:
    """Answers HEAD as GET without a body, for probes and clients that only ask for presence."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_without_body(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET"}, receive, send_without_body)
