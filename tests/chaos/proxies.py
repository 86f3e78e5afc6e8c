"""Proxies in front of sandboxes, which delay, cut and flip what passes; and one of the zygote's
socket, which puts them there: control and routers are told the proxies' addresses.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from faasmoe_contracts.unix_socket import unix_socket_path

CHUNK_BYTES = 1 << 16


class ProxyConnections:
    """The connections that are handled; ended by their ends, as a cancelled handler is a fault."""

    def __init__(self) -> None:
        self._handlers: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_closed = False

    @contextlib.contextmanager
    def tracking(self, *writers: asyncio.StreamWriter) -> Iterator[None]:
        """Have these ends aborted when the block ends, or when all are."""
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        task.add_done_callback(self._handlers.discard)
        self._writers.update(writers)
        if self._is_closed:
            self.abort()
        try:
            yield
        finally:
            for one in writers:
                one.transport.abort()
                self._writers.discard(one)

    def abort(self) -> None:
        """End all of them, and those to come."""
        self._is_closed = True
        for one in self._writers:
            one.transport.abort()

    async def close(self) -> None:
        """End all of them and wait until they have ended."""
        self.abort()
        while self._handlers:
            await asyncio.gather(*self._handlers, return_exceptions=True)
            await asyncio.sleep(0)  # for those that were accepted and have not begun


class SandboxProxy:
    """Passes on the connections to one sandbox.

    Args:
        pid: the sandbox's process.
        target: its address.
        near: a folder in which the proxy listens at a Unix socket too, as a sandbox of the router's
            machine does, whose hot functions the router may compute itself; None for TCP alone.

    Attributes:
        pid: the sandbox's process.
        address: where the proxy listens.
    """

    def __init__(self, pid: int, target: str, socket_dir: Path | None = None) -> None:
        self.pid = pid
        self._socket_dir = socket_dir
        self._unix_server: asyncio.Server | None = None
        self.address = ""
        self._target = target
        self._server: asyncio.Server | None = None
        self._connections = ProxyConnections()
        self._delay_s = 0.0
        self._delay_until_s = 0.0
        self._cut_next = False
        self._flip_next: dict[str, float] = {}

    async def open(self) -> None:
        """Listen."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        if self._socket_dir is not None:
            path = unix_socket_path(self._socket_dir, port)
            self._unix_server = await asyncio.start_unix_server(self._accept, path)
        self.address = f"127.0.0.1:{port}"

    def close(self) -> None:
        """Stop listening and end every connection, as when the sandbox ends."""
        for server in (self._server, self._unix_server):
            if server is not None:
                server.close()
        self._connections.abort()

    async def close_and_wait(self) -> None:
        """Close, and wait until every connection has ended."""
        self.close()
        await self._connections.close()

    def delay(self, delay_s: float, *, for_s: float) -> None:
        """Hold back each chunk for a while."""
        self._delay_s, self._delay_until_s = delay_s, time.monotonic() + for_s

    def cut(self) -> None:
        """Cut the connection over which the next chunk goes in the middle of it."""
        self._cut_next = True

    def flip(self, direction: str, position: float) -> None:
        """Flip a bit of the next chunk: of a request or of an answer."""
        self._flip_next[direction] = position

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._target.rpartition(":")
        with self._connections.tracking(writer), contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
            with self._connections.tracking(far_writer):
                await self._relay_both(reader, writer, far_reader, far_writer)

    async def _relay_both(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        sandbox_reader: asyncio.StreamReader,
        sandbox_writer: asyncio.StreamWriter,
    ) -> None:
        pipes = [
            asyncio.create_task(self._relay(reader, sandbox_writer, "request")),
            asyncio.create_task(self._relay(sandbox_reader, writer, "answer")),
        ]
        try:
            await asyncio.wait(pipes, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pipe in pipes:
                pipe.cancel()
            await asyncio.gather(*pipes, return_exceptions=True)

    async def _relay(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: str
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(CHUNK_BYTES):
                if time.monotonic() < self._delay_until_s:
                    await asyncio.sleep(self._delay_s)
                if self._cut_next:
                    self._cut_next = False
                    writer.write(data[: len(data) // 2])
                    return
                writer.write(self._flip_if_requested(data, direction))
                await writer.drain()

    def _flip_if_requested(self, data: bytes, direction: str) -> bytes:
        position = self._flip_next.pop(direction, None)
        if position is None:
            return data
        flipped = bytearray(data)
        bit = int(position * 8 * len(data))
        flipped[bit // 8] ^= 1 << bit % 8
        return bytes(flipped)


class ZygoteProxy:
    """Stands between control and the zygote; knows every sandbox.

    Every other sandbox has its proxy at a Unix socket too, in the folder `near`.

    Attributes:
        sandboxes: the proxy of each sandbox that runs.
    """

    def __init__(self, socket: Path, zygote: Path, *, socket_dir: Path) -> None:
        self._socket_dir = socket_dir
        self._n_proxies = 0
        self.sandboxes: dict[str, SandboxProxy] = {}
        self._socket = socket
        self._zygote = zygote
        self._server: asyncio.Server | None = None
        self._connections = ProxyConnections()

    async def open(self) -> None:
        """Listen."""
        self._server = await asyncio.start_unix_server(self._accept, self._socket)

    async def close(self) -> None:
        """Stop, and wait until every connection has ended."""
        if self._server is not None:
            self._server.close()
        await self._connections.close()
        for proxy in self.sandboxes.values():
            await proxy.close_and_wait()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with self._connections.tracking(writer), contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_unix_connection(self._zygote)
            with self._connections.tracking(far_writer):
                await self._relay_rewritten(reader, writer, far_reader, far_writer)

    async def _relay_rewritten(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        zygote_reader: asyncio.StreamReader,
        zygote_writer: asyncio.StreamWriter,
    ) -> None:
        async def commands() -> None:
            while line := await reader.readline():
                zygote_writer.write(line)

        async def events() -> None:
            while line := await zygote_reader.readline():
                writer.write(await self._rewrite_event(line))

        await _run_until_first_done(commands, events)
        if zygote_reader.at_eof():  # the zygote ended, and all sandboxes with it
            await self._close_except(set())

    async def _rewrite_event(self, line: bytes) -> bytes:
        event: dict[str, Any] = json.loads(line)
        if event.get("event") == "spawned":
            event["address"] = await self._proxy_address(event)
        elif event.get("event") == "sandboxes":
            for found in event["sandboxes"]:
                found["address"] = await self._proxy_address(found)
            await self._close_except({found["id"] for found in event["sandboxes"]})
        elif event.get("event") == "exited" and (gone := self.sandboxes.pop(event["id"], None)):
            gone.close()
        return json.dumps(event).encode() + b"\n"

    async def _proxy_address(self, sandbox: dict[str, Any]) -> str:
        proxy = self.sandboxes.get(sandbox["id"])
        if proxy is None:
            near = self._socket_dir if self._n_proxies % 2 == 0 else None
            self._n_proxies += 1
            proxy = SandboxProxy(int(sandbox["pid"]), str(sandbox["address"]), near)
            await proxy.open()
            self.sandboxes[sandbox["id"]] = proxy
        return proxy.address

    async def _close_except(self, known: set[str]) -> None:
        for name in self.sandboxes.keys() - known:
            self.sandboxes.pop(name).close()


async def _run_until_first_done(*coroutines: Callable[[], Awaitable[None]]) -> None:
    tasks = [asyncio.ensure_future(work()) for work in coroutines]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
