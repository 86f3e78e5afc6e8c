"""Sending an answer, and noticing that nobody listens any more."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from faasmoe_router.api.answers import to_json
from faasmoe_router.api.errors import internal_error, of_router_error
from faasmoe_router.engine.generation import Generation
from faasmoe_router.errors import RouterError

logger = logging.getLogger(__name__)


class ClientGone(Exception):
    """The client hung up before its answer was ready."""


T = TypeVar("T")


async def unless_hung_up(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what the work returns; cancels it and raises ClientGone if the client hangs up."""
    working = asyncio.create_task(work)
    listening = asyncio.create_task(_hung_up(request))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, listening):
            task.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events of one generation, which is freed however the response ends."""

    def __init__(self, events: AsyncIterator[dict[str, Any]], generation: Generation) -> None:
        super().__init__(
            _framed(events),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client hangs up."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()


async def _framed(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    try:
        async for event in events:
            yield _frame(to_json(event))
    except RouterError as error:
        yield _frame(to_json(of_router_error(error).body))
    except Exception:  # the status is sent already: the event is the only place left to tell it
        logger.exception("A stream failed")
        yield _frame(to_json(internal_error().body))
    else:
        yield _frame(b"[DONE]")


def _frame(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
