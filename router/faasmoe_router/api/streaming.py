"""Server-sent events, and cancellation when the client disconnects."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from faasmoe_router.api.errors import ClientDisconnected, from_router_error, internal_error
from faasmoe_router.engine.generation import Generation
from faasmoe_router.errors import RouterError

logger = logging.getLogger(__name__)


T = TypeVar("T")


async def run_until_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`; if the client disconnects first, cancel it.

    Raises:
        ClientDisconnected: the client disconnected.
    """
    work_task = asyncio.create_task(work)
    disconnect_task = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({work_task, disconnect_task}, return_when=asyncio.FIRST_COMPLETED)
        if disconnect_task.done():  # also if the work is done too: nobody waits for its result
            raise ClientDisconnected
        return work_task.result()
    finally:
        for task in (work_task, disconnect_task):
            task.cancel()
        await asyncio.gather(work_task, disconnect_task, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStreamResponse(StreamingResponse):
    """A response of server-sent events that frees its generation however it ends.

    Args:
        chunks: the JSON object of each event.
        generation: the source of the chunks; cancelled when the response ends.
    """

    def __init__(self, chunks: AsyncIterator[dict[str, Any]], generation: Generation) -> None:
        super().__init__(
            _sse_frames(chunks),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._generation = generation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client disconnects."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._generation.cancel()


async def _sse_frames(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Yield the frame of each chunk, then `[DONE]`; a failure becomes the last event instead.

    The status line is sent already when a generation fails, so only an event can carry the error.
    """
    try:
        async for chunk in chunks:
            yield _json_frame(chunk)
    except RouterError as error:
        yield _json_frame(from_router_error(error).body)
    except Exception:
        logger.exception("Streaming a response failed")
        yield _json_frame(internal_error().body)
    else:
        yield _sse_frame(b"[DONE]")


def _json_frame(value: dict[str, Any]) -> bytes:
    return _sse_frame(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())


def _sse_frame(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
