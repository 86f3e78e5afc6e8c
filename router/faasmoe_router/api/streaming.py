"""Sending an answer, and noticing that nobody listens any more."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from faasmoe_router.api.errors import from_router_error, internal_error
from faasmoe_router.api.responses import to_event_json
from faasmoe_router.engine.generation import Generation
from faasmoe_router.errors import RouterError

logger = logging.getLogger(__name__)


class ClientDisconnected(Exception):
    """The client hung up before its answer was ready."""


T = TypeVar("T")


async def run_until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what the work returns; cancels it and raises ClientGone if the client hangs up."""
    work_task = asyncio.create_task(work)
    disconnect_task = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({work_task, disconnect_task}, return_when=asyncio.FIRST_COMPLETED)
        if work_task.done():
            return work_task.result()
        raise ClientDisconnected
    finally:
        for task in (work_task, disconnect_task):
            task.cancel()
        await asyncio.gather(work_task, disconnect_task, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStreamResponse(StreamingResponse):
    """Server-sent events of one generation, which is freed however the response ends."""

    def __init__(self, events: AsyncIterator[dict[str, Any]], generation: Generation) -> None:
        super().__init__(
            _sse_frames(events),
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


async def _sse_frames(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    try:
        async for event in events:
            yield _sse_frame(to_event_json(event))
    except RouterError as error:
        yield _sse_frame(to_event_json(from_router_error(error).body))
    except Exception:  # the status is sent already: the event is the only place left to tell it
        logger.exception("A stream failed")
        yield _sse_frame(to_event_json(internal_error().body))
    else:
        yield _sse_frame(b"[DONE]")


def _sse_frame(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
