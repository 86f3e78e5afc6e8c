"""Reads a request's body into its model: bounded, off the event loop, in its tenant's turn.

The routes read their bodies here rather than through FastAPI, which parses and validates on the
event loop whatever arrives. Errors are the same as FastAPI's, in OpenAI's shape.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from email.message import Message
from typing import Any, Generic, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from faasmoe_router.api.body_limits import BodyLimits, check_structure
from faasmoe_router.api.errors import (
    from_json_error,
    from_validation_errors,
    invalid_json,
    not_an_object,
)
from faasmoe_router.api.preparation import INLINE_BYTES, HeldBytes, PreparationQueue, held_bytes
from faasmoe_router.api.streaming import run_until_disconnect
from faasmoe_router.tenants.service import Caller

Model = TypeVar("Model", bound=BaseModel)
T = TypeVar("T")


class BodyReader:
    """Reads bodies.

    Args:
        limits: limits on one body.
        queue: parses them in turns.
        held: bounds the memory of all bodies.
    """

    def __init__(self, limits: BodyLimits, queue: PreparationQueue, held: HeldBytes) -> None:
        self._limits = limits
        self._queue = queue
        self._held = held

    def reading(
        self, request: Request, model: type[Model], caller: Caller
    ) -> AbstractAsyncContextManager[Model]:
        """Return a context with a request's body as its model; see `converting`."""
        return self.converting(request, model, caller, _unconverted)

    @asynccontextmanager
    async def converting(
        self, request: Request, model: type[Model], caller: Caller, convert: Callable[[Model], T]
    ) -> AsyncIterator[T]:
        """Yield what a request's body is converted to.

        The memory of the body is counted until the context ends.

        Args:
            request: the HTTP request.
            model: the model of its body.
            caller: who sent it.
            convert: makes of the body what is needed; may raise ApiError.

        Raises:
            ApiError: it is not JSON, too large or invalid.
            TenantQueueFull: too many of the caller's bodies are being read already.
            ClientDisconnect: the client hung up before the end of the body.
        """
        key = object()
        try:
            body = await self._receive(request, caller, key)
            if not _is_json_type(request.headers.get("content-type", "")) or not body:
                raise not_an_object()
            size_bytes = len(body)
            parsing = _Parsing(bytes(body), model, self._limits, convert)
            del body
            if size_bytes <= INLINE_BYTES:
                yield parsing.parse()
            else:
                work = self._parse_in_turn(parsing, caller, key, size_bytes)
                yield await run_until_disconnect(request, work)
        finally:
            self._held.release(caller, key)

    async def _parse_in_turn(
        self, parsing: _Parsing[Model, T], caller: Caller, key: object, size_bytes: int
    ) -> T:
        n_values = await self._queue.run(caller, parsing.measure, size_bytes=size_bytes)
        self._held.hold(caller, key, held_bytes(size_bytes, n_values))
        return await self._queue.run(caller, parsing.parse, size_bytes=size_bytes)

    async def _receive(self, request: Request, caller: Caller, key: object) -> bytearray:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            self._held.hold(caller, key, len(body))
        return body


class _Parsing(Generic[Model, T]):
    """Parses one body; forgets it as soon as it is parsed."""

    def __init__(
        self,
        body: bytes,
        model: type[Model],
        limits: BodyLimits,
        convert: Callable[[Model], T],
    ) -> None:
        self._convert = convert
        self._body = body
        self._model = model
        self._limits = limits

    def measure(self) -> int:
        """Return the number of its values; raises ApiError if it exceeds the limits."""
        return check_structure(self._body, self._limits).n_values

    def parse(self) -> T:
        """Return what its model is converted to; raises ApiError."""
        body, self._body = self._body, b""
        value = _load_json(body)
        del body
        try:
            model = self._model.model_validate(value)
        except ValidationError as error:
            details = error.errors(include_url=False)
            raise from_validation_errors(
                [{**detail, "loc": ("body", *detail["loc"])} for detail in details[:1]]
            ) from None
        return self._convert(model)


def _unconverted(model: Model) -> Model:
    return model


def _load_json(body: bytes) -> Any:
    if json.detect_encoding(body) not in ("utf-8", "utf-8-sig"):
        raise invalid_json("expected UTF-8")
    try:
        return json.loads(body)
    except Exception as error:
        raise from_json_error(error) from None


def _is_json_type(content_type: str) -> bool:
    message = Message()
    message["content-type"] = content_type
    subtype = message.get_content_subtype()
    is_application = message.get_content_maintype() == "application"
    return is_application and (subtype == "json" or subtype.endswith("+json"))
