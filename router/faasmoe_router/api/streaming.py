"""Server-sent events, and cancellation when the client disconnects."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from faasmoe_router.api.errors import ClientDisconnected, from_router_error, internal_error
from faasmoe_router.errors import RouterError

logger = logging.getLogger(__name__)

KEEPALIVE_S = 15.0
KEEPALIVE_FRAME = b": waiting\n\n"


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
        frames: the events, such as those of `sse_frames`.
        on_close: called when the response has ended.
        keepalive_frame: sent when there is none for long.
    """

    def __init__(
        self,
        frames: AsyncIterator[bytes],
        on_close: Callable[[], None],
        *,
        keepalive_frame: bytes = KEEPALIVE_FRAME,
    ) -> None:
        super().__init__(
            _with_keepalives(frames, keepalive_frame),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client disconnects."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_close()


async def _with_keepalives(
    frames: AsyncIterator[bytes], keepalive_frame: bytes
) -> AsyncIterator[bytes]:
    """Yield the frames, and a comment whenever KEEPALIVE_S pass without one.

    A stream may wait long for its turn, and load balancers close connections that are silent.
    """
    frame: asyncio.Future[bytes | None] | None = None
    try:
        while True:
            frame = asyncio.ensure_future(_next_frame(frames))
            while not frame.done():
                await asyncio.wait({frame}, timeout=KEEPALIVE_S)
                if not frame.done():
                    yield keepalive_frame
            if (content := frame.result()) is None:
                return
            yield content
    finally:
        if frame is not None and not frame.done():
            frame.cancel()
            await asyncio.gather(frame, return_exceptions=True)


async def _next_frame(frames: AsyncIterator[bytes]) -> bytes | None:
    """Return the next frame; None at the end, which a task could not raise."""
    return await anext(frames, None)


def log_stream_failure() -> None:
    """Log the exception that ends a stream."""
    logger.exception("Streaming a response failed")


async def sse_frames(chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Yield the frame of each chunk, then `[DONE]`; a failure becomes the last event instead.

    Nothing follows if the client has disconnected. The status line is sent already when a
    generation fails, so only an event can carry the error.
    """
    try:
        async for chunk in chunks:
            yield _json_frame(chunk)
    except ClientDisconnected:
        return
    except RouterError as error:
        yield _json_frame(from_router_error(error).body)
    except Exception:
        log_stream_failure()
        yield _json_frame(internal_error().body)
    else:
        yield _sse_frame(b"[DONE]")


def _json_frame(value: dict[str, Any]) -> bytes:
    return _sse_frame(json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode())


def _sse_frame(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"
