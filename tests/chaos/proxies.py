"""Proxies that inject network faults: delays, cut connections and flipped bits.

Each sandbox has a proxy. Another proxy in front of the zygote's socket creates them and replaces
the sandboxes' addresses in the zygote's events, so that control process and routers connect to the
proxies.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from tests.chaos.mailbox_relay import MailboxRelay, read_offer

from faasmoe_contracts.unix_socket import unix_socket_path

CHUNK_BYTES = 1 << 16


class ProxyConnections:
    """Open connections of a proxy.

    They are closed by aborting their transports rather than by cancelling their handlers, because
    asyncio logs a cancelled handler as an error.
    """

    def __init__(self) -> None:
        self._handlers: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_closed = False

    @contextlib.contextmanager
    def tracking(self, *writers: asyncio.StreamWriter) -> Iterator[None]:
        """Abort the writers when the block ends or when the proxy closes."""
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
            for writer in writers:
                writer.transport.abort()
                self._writers.discard(writer)

    def abort(self) -> None:
        """Abort all connections, including future ones."""
        self._is_closed = True
        for writer in self._writers:
            writer.transport.abort()

    async def close(self) -> None:
        """Abort all connections and wait for their handlers."""
        self.abort()
        while self._handlers:
            await asyncio.gather(*self._handlers, return_exceptions=True)
            await asyncio.sleep(0)  # lets accepted connections start their handlers


class SandboxProxy:
    """Relays the connections to one sandbox and injects faults.

    Args:
        pid: process id of the sandbox.
        target: address of the sandbox.
        socket_dir: folder of an additional Unix socket, as a sandbox on the router's machine has,
            whose hot functions the router may run in its own process; None for TCP only.
        sandbox_socket_dir: folder of the sandbox's own Unix socket, over which the router's mailbox
            is offered.

    Attributes:
        pid: process id of the sandbox.
        address: address on which the proxy listens.
    """

    def __init__(
        self,
        pid: int,
        target: str,
        socket_dir: Path | None = None,
        sandbox_socket_dir: Path | None = None,
    ) -> None:
        self.pid = pid
        self._sandbox_socket_dir = sandbox_socket_dir
        self._mailboxes = MailboxRelay()
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
            self._unix_server = await asyncio.start_unix_server(self._accept_unix, path)
        self.address = f"127.0.0.1:{port}"

    def close(self) -> None:
        """Stop listening and abort all connections, as if the sandbox had exited."""
        for server in (self._server, self._unix_server):
            if server is not None:
                server.close()
        self._connections.abort()

    async def close_and_wait(self) -> None:
        """Close and wait for all connection handlers."""
        self.close()
        await self._connections.close()

    def delay(self, delay_s: float, *, for_s: float) -> None:
        """Delay each chunk by delay_s during the next for_s seconds."""
        self._delay_s, self._delay_until_s = delay_s, time.monotonic() + for_s

    def cut(self) -> None:
        """Close a connection in the middle of its next chunk."""
        self._cut_next = True

    def flip(self, direction: str, position: float) -> None:
        """Flip a bit of the next chunk, and one in each mailbox.

        Args:
            direction: "request" or "answer".
            position: position of the bit as a fraction of the chunk.
        """
        self._flip_next[direction] = position
        self._mailboxes.flip()

    async def _accept_unix(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with self._connections.tracking(writer), contextlib.suppress(OSError):
            start, body = await read_offer(reader)
            if body is None or self._sandbox_socket_dir is None:
                await self._connect(reader, writer, start + (body or b""))
                return
            client = writer.get_extra_info("socket")
            port = int(self._target.rpartition(":")[2])
            path = unix_socket_path(self._sandbox_socket_dir, port)
            with self._mailboxes.offering(start, body, client) as request:
                sandbox_reader, sandbox_writer = await asyncio.open_unix_connection(path)
                with self._connections.tracking(sandbox_writer):
                    sandbox_writer.write(request)
                    await self._relay_both(reader, writer, sandbox_reader, sandbox_writer)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with self._connections.tracking(writer), contextlib.suppress(OSError):
            await self._connect(reader, writer, b"")

    async def _connect(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, start: bytes
    ) -> None:
        """Relay a connection whose first bytes were read already."""
        host, _, port = self._target.rpartition(":")
        target_reader, target_writer = await asyncio.open_connection(host, int(port))
        with self._connections.tracking(target_writer):
            target_writer.write(start)
            await self._relay_both(reader, writer, target_reader, target_writer)

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
    """Relays the control process's connection to the zygote and puts a proxy in front of sandboxes.

    Proxies also listen on a Unix socket, as sandboxes on the router's machine do.

    Args:
        socket: Unix socket on which to listen.
        zygote: Unix socket of the zygote.
        socket_dir: folder of the Unix sockets of sandbox proxies.
        sandbox_socket_dir: folder of the Unix sockets of sandboxes.

    Attributes:
        sandboxes: proxies of the running sandboxes by sandbox id.
        has_remote: whether every second proxy from now on has no Unix socket, as if its sandbox
            were on another machine.
    """

    def __init__(
        self, socket: Path, zygote: Path, *, socket_dir: Path, sandbox_socket_dir: Path
    ) -> None:
        self._socket_dir = socket_dir
        self._sandbox_socket_dir = sandbox_socket_dir
        self._n_proxies = 0
        self.sandboxes: dict[str, SandboxProxy] = {}
        self.has_remote = True
        self._socket = socket
        self._zygote = zygote
        self._server: asyncio.Server | None = None
        self._connections = ProxyConnections()

    async def open(self) -> None:
        """Listen."""
        self._server = await asyncio.start_unix_server(self._accept, self._socket)

    async def close(self) -> None:
        """Stop listening, close all proxies and wait for their connection handlers."""
        if self._server is not None:
            self._server.close()
        await self._connections.close()
        for proxy in self.sandboxes.values():
            await proxy.close_and_wait()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with self._connections.tracking(writer), contextlib.suppress(OSError):
            target_reader, target_writer = await asyncio.open_unix_connection(self._zygote)
            with self._connections.tracking(target_writer):
                await self._relay_rewritten(reader, writer, target_reader, target_writer)

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
        if zygote_reader.at_eof():  # the zygote exited, and so did all sandboxes
            await self._close_except(set())

    async def _rewrite_event(self, line: bytes) -> bytes:
        event: dict[str, Any] = json.loads(line)
        if event.get("event") == "spawned":
            event["address"] = await self._proxy_address(event)
        elif event.get("event") == "sandboxes":
            for sandbox in event["sandboxes"]:
                sandbox["address"] = await self._proxy_address(sandbox)
            await self._close_except({sandbox["id"] for sandbox in event["sandboxes"]})
        elif event.get("event") == "exited" and (proxy := self.sandboxes.pop(event["id"], None)):
            proxy.close()
        return json.dumps(event).encode() + b"\n"

    async def _proxy_address(self, sandbox: dict[str, Any]) -> str:
        proxy = self.sandboxes.get(sandbox["id"])
        if proxy is None:
            is_remote = self.has_remote and self._n_proxies % 2 == 1
            socket_dir = None if is_remote else self._socket_dir
            self._n_proxies += 1
            proxy = SandboxProxy(
                int(sandbox["pid"]),
                str(sandbox["address"]),
                socket_dir,
                self._sandbox_socket_dir,
            )
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
