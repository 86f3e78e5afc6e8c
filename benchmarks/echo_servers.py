"""Echo servers against which the fan-out is measured: each returns the body of a POST.

The kinds differ in their HTTP implementation: uvicorn, or the sandbox's own protocol on an asyncio
or uvloop event loop. FRAMES and UNIX_FRAMES also decode and encode the wire format as a sandbox
does. `forked_servers` runs them as processes.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import shutil
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from faasmoe_contracts.parent_death import die_with_parent
from faasmoe_contracts.unix_socket import unix_socket_path
from faasmoe_contracts.wire import decode_request, encode_response
from faasmoe_expert.config import SandboxConfig
from faasmoe_expert.server.connection import HttpConnection
from faasmoe_expert.server.http import FRAME_CONTENT_TYPE, HttpRequest, HttpResponse

BACKLOG = 128
END_TIMEOUT_S = 5.0

Serve = Callable[[socket.socket], None]


@dataclass(frozen=True, slots=True)
class ServerKind:
    """A server implementation.

    Attributes:
        name: label in tables.
        serve: serves on a listening socket until the process ends.
        is_unix: whether to listen on Unix sockets rather than on TCP loopback.
    """

    name: str
    serve: Serve
    is_unix: bool = False


def _serve_protocol(
    listener: socket.socket,
    handle: Callable[[HttpRequest], HttpResponse],
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def serve() -> None:
        connections: set[HttpConnection] = set()
        loop = asyncio.get_running_loop()
        timeout_s = SandboxConfig().request_timeout_s
        is_unix = listener.family == socket.AF_UNIX
        create = loop.create_unix_server if is_unix else loop.create_server
        server = await create(
            lambda: HttpConnection(handle, connections, timeout_s=timeout_s), sock=listener
        )
        await server.serve_forever()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(serve())


def _echo(request: HttpRequest) -> HttpResponse:
    return HttpResponse(200, FRAME_CONTENT_TYPE, [request.frame])


def _echo_frame(request: HttpRequest) -> HttpResponse:
    frame = decode_request(request.frame)
    return HttpResponse(200, FRAME_CONTENT_TYPE, encode_response(frame.header, frame.rows))


async def _asgi(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    body = b"".join(parts)
    headers = [
        (b"content-type", FRAME_CONTENT_TYPE.encode()),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _serve_uvicorn(listener: socket.socket) -> None:
    config = uvicorn.Config(
        _asgi,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        date_header=False,
    )
    uvicorn.Server(config).run(sockets=[listener])


UVICORN = ServerKind("uvicorn, httptools", _serve_uvicorn)
ASYNCIO = ServerKind("ours, asyncio", lambda s: _serve_protocol(s, _echo, asyncio.new_event_loop))
UVLOOP = ServerKind("ours, uvloop", lambda s: _serve_protocol(s, _echo, uvloop.new_event_loop))
UNIX = ServerKind("ours, uvloop, Unix sockets", UVLOOP.serve, is_unix=True)
FRAMES = ServerKind(
    "ours, uvloop", lambda s: _serve_protocol(s, _echo_frame, uvloop.new_event_loop)
)
UNIX_FRAMES = ServerKind("ours, uvloop, Unix sockets", FRAMES.serve, is_unix=True)


@dataclass(frozen=True, slots=True)
class RunningServers:
    """Running servers.

    Attributes:
        addresses: host:port of each server.
        socket_dir: folder of their Unix sockets; None for TCP.
    """

    addresses: list[str]
    socket_dir: Path | None


@contextmanager
def forked_servers(kind: ServerKind, n_servers: int) -> Iterator[RunningServers]:
    """Run servers in forked processes for the lifetime of the context.

    Enter the context before this process starts a thread, because fork copies only one.
    """
    context = multiprocessing.get_context("fork")
    folder = Path(tempfile.mkdtemp(prefix="faasmoe-bench-"))
    listeners = [_listen(kind, unix_socket_path(folder, port)) for port in range(1, n_servers + 1)]
    parent_pid = os.getpid()
    servers = [
        context.Process(
            target=_serve_until_parent_dies, args=(kind.serve, listener, parent_pid), daemon=True
        )
        for listener in listeners
    ]
    try:
        for server in servers:
            server.start()
        addresses = [_address(listener) for listener in listeners]
        yield RunningServers(addresses, folder if kind.is_unix else None)
    finally:
        for server in servers:
            server.kill()
            server.join(END_TIMEOUT_S)
        for listener in listeners:
            listener.close()
        shutil.rmtree(folder)


def _listen(kind: ServerKind, path: Path) -> socket.socket:
    if not kind.is_unix:
        return socket.create_server(("127.0.0.1", 0), backlog=BACKLOG)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(BACKLOG)
    return listener


def _address(listener: socket.socket) -> str:
    name = listener.getsockname()
    port = Path(name).stem if listener.family == socket.AF_UNIX else name[1]
    return f"127.0.0.1:{port}"


def _serve_until_parent_dies(serve: Serve, listener: socket.socket, parent_pid: int) -> None:
    die_with_parent(parent_pid)
    serve(listener)
