"""Servers that a fan-out is measured against: each answers a POST with the bytes it was sent.

`forked` runs some of them as processes. What differs is who speaks HTTP: uvicorn, or a sandbox's
own protocol on asyncio's loop or on uvloop's. `frames` also reads and writes the wire format, as a
sandbox does.
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

from faasmoe_expert.config import SandboxConfig
from faasmoe_expert.lifeline import die_with_parent
from faasmoe_expert.same_node import socket_path
from faasmoe_expert.server.answer import FRAME, Answer
from faasmoe_expert.server.protocol import HttpProtocol
from faasmoe_expert.server.request import HttpRequest
from faasmoe_expert.wire import decode_request, encode_response

BACKLOG = 128
END_TIMEOUT_S = 5.0

Serve = Callable[[socket.socket], None]


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of server.

    Attributes:
        name: what tables call it.
        serve: serves on a listening socket.
        is_unix: whether that is a Unix socket, in place of TCP on loopback.
    """

    name: str
    serve: Serve
    is_unix: bool = False


def _serve_protocol(
    listener: socket.socket,
    handle: Callable[[HttpRequest], Answer],
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def serve() -> None:
        connections: set[HttpProtocol] = set()
        loop = asyncio.get_running_loop()
        timeout_s = SandboxConfig().request_timeout_s
        is_unix = listener.family == socket.AF_UNIX
        create = loop.create_unix_server if is_unix else loop.create_server
        server = await create(
            lambda: HttpProtocol(handle, connections, timeout_s=timeout_s), sock=listener
        )
        await server.serve_forever()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(serve())


def _echo(request: HttpRequest) -> Answer:
    return Answer(200, FRAME, [request.frame])


def _echo_frame(request: HttpRequest) -> Answer:
    frame = decode_request(request.frame)
    return Answer(200, FRAME, encode_response(frame.header, frame.rows))


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
    headers = [(b"content-type", FRAME.encode()), (b"content-length", str(len(body)).encode())]
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


UVICORN = Kind("uvicorn, httptools", _serve_uvicorn)
ASYNCIO = Kind("ours, asyncio", lambda s: _serve_protocol(s, _echo, asyncio.new_event_loop))
UVLOOP = Kind("ours, uvloop", lambda s: _serve_protocol(s, _echo, uvloop.new_event_loop))
UNIX = Kind("ours, uvloop, Unix sockets", UVLOOP.serve, is_unix=True)
FRAMES = Kind("ours, uvloop", lambda s: _serve_protocol(s, _echo_frame, uvloop.new_event_loop))
UNIX_FRAMES = Kind("ours, uvloop, Unix sockets", FRAMES.serve, is_unix=True)


@dataclass(frozen=True, slots=True)
class Servers:
    """Servers that run.

    Attributes:
        addresses: host:port of each.
        socket_dir: where they have Unix sockets, if that is what they listen on.
    """

    addresses: list[str]
    socket_dir: Path | None


@contextmanager
def forked(kind: Kind, n_servers: int) -> Iterator[Servers]:
    """Run servers in processes as long as the context lasts.

    Must be entered before this process has any other thread.
    """
    context = multiprocessing.get_context("fork")
    folder = Path(tempfile.mkdtemp(prefix="faasmoe-bench-"))
    listeners = [_listener(kind, socket_path(folder, port)) for port in range(1, n_servers + 1)]
    parent_pid = os.getpid()
    servers = [
        context.Process(target=_run, args=(kind.serve, listener, parent_pid), daemon=True)
        for listener in listeners
    ]
    try:
        for server in servers:
            server.start()
        addresses = [_address(listener) for listener in listeners]
        yield Servers(addresses, folder if kind.is_unix else None)
    finally:
        for server in servers:
            server.kill()
            server.join(END_TIMEOUT_S)
        for listener in listeners:
            listener.close()
        shutil.rmtree(folder)


def _listener(kind: Kind, path: Path) -> socket.socket:
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


def _run(serve: Serve, listener: socket.socket, parent_pid: int) -> None:
    die_with_parent(parent_pid)
    serve(listener)
