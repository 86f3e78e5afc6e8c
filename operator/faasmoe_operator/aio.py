"""asyncio building blocks: background tasks, bounded concurrency, notification, line reading.

Imports only the standard library and contracts, so that every package of the control plane can use
it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from typing import Any, Protocol, TypeVar

from faasmoe_contracts.tls import TlsPeer

MAX_LINE_BYTES = 1 << 16

Item = TypeVar("Item")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


def http_scheme(tls: TlsPeer | None) -> tuple[str, dict[str, Any]]:
    """Return the scheme of URLs of a server, and what aiohttp needs to know it by.

    Args:
        tls: how the server is known; None for one without TLS.
    """
    if tls is None:
        return "http", {}
    return "https", {"ssl": tls.context(), "server_hostname": tls.name}


class TaskSet:
    """Background tasks.

    Holds a reference to each task, as the event loop keeps only weak ones, and logs its exception.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in the background."""
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    async def cancel_all(self) -> None:
        """Cancel all running tasks and wait until they have ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a background task failed", exc_info=error)


class ChangeNotifier:
    """A condition variable for one event loop, without a lock."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Make all waiters evaluate their conditions again."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds; it is evaluated once for each notification."""
        while not condition():
            await self._event.wait()


async def gather_limited(
    items: Iterable[Item], function: Callable[[Item], Awaitable[Result]], *, limit: int
) -> list[Result]:
    """Call a function for each item concurrently; return the results in order.

    The first exception cancels all other calls and propagates.

    Args:
        items: one argument for each call.
        function: the function to call.
        limit: maximum number of concurrent calls.
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


class LineSource(Protocol):
    """What lines are read from."""

    async def readline(self) -> bytes:
        """Return the next line with its end; what is left, or nothing, at the end of the stream.

        Raises ValueError for a line that is too long.
        """
        ...


class LineReader:
    """Reads the lines of a stream, of a length that may change once it is known who sends them.

    Args:
        stream: the stream, whose own limit is the least that is read ahead.

    Attributes:
        max_bytes: most bytes of a line.
    """

    def __init__(self, stream: asyncio.StreamReader, *, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._stream = stream
        self._buffer = bytearray()

    async def readline(self) -> bytes:
        """Return the next line with its end; what is left, or nothing, at the end of the stream.

        Raises ValueError for a line that is too long.
        """
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > self.max_bytes:
                raise ValueError(f"got a line of more than {self.max_bytes} bytes, expected fewer")
            chunk = await self._stream.read(MAX_LINE_BYTES)
            if not chunk:
                end = searched
                break
            self._buffer += chunk
        line = bytes(self._buffer[: end + 1])
        del self._buffer[: end + 1]
        return line


async def read_lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Yield each line of a stream without its line ending.

    A line longer than `MAX_LINE_BYTES` is yielded in pieces, so that no output exhausts memory.
    """
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
