"""Background tasks that are held, and whose faults are not lost.

Many calls at the same time, not too many, all ended if one fails.

Lines of a child's output, long ones cut, so that no output can exhaust memory.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

logger = logging.getLogger(__name__)


class TaskSet:
    """A set of running tasks."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in the background."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    async def cancel_all(self) -> None:
        """Cancel what still runs and wait for it."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a background task failed", exc_info=error)


Item = TypeVar("Item")
Result = TypeVar("Result")


async def gather_limited(
    items: Iterable[Item], function: Callable[[Item], Awaitable[Result]], *, limit: int
) -> list[Result]:
    """Return the results of a call for each item, in order; the first failure cancels the rest.

    Args:
        items: one argument for each call.
        call: what to do.
        limit: calls at the same time, at most.
    """
    slots = asyncio.Semaphore(limit)

    async def run_limited(item: Item) -> Result:
        async with slots:
            return await function(item)

    tasks = [asyncio.ensure_future(run_limited(item)) for item in items]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


MAX_LINE_BYTES = 1 << 16


async def read_lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Give each line without its end; a line longer than MAX_LINE_BYTES comes in pieces."""
    partial = b""
    while chunk := await stream.read(MAX_LINE_BYTES):
        *lines, partial = (partial + chunk).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace").rstrip("\r")
        if len(partial) > MAX_LINE_BYTES:
            yield partial.decode(errors="replace")
            partial = b""
    if partial:
        yield partial.decode(errors="replace")
