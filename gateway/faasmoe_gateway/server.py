"""The HTTP server: uvicorn with a graceful drain.

uvicorn closes its listeners at shutdown, waits for running responses and then cuts them. This
server keeps listening while they finish: it reports not ready and rejects new work with 503 and
Retry-After, since a client whose connection is refused cannot tell a shutdown from a failure.
Responses that take too long end with an error that the client can read. `run` returns after a
signal instead of re-raising it, so that the caller's cleanup runs. Without clients it does so at
once, because others may wait for the memory of the process.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from faasmoe_contracts.stream_records import DRAINING_HEADER
from faasmoe_contracts.tls import TlsFolder
from faasmoe_gateway.connections import ConnectionLimits
from faasmoe_gateway.errors import send_error
from faasmoe_gateway.http_protocol import bounded_protocol

READINESS_PATH = "/health"
WORK_METHODS = ("POST", "PUT", "PATCH", "DELETE")
TICK_S = 0.1  # uvicorn's, which counts them
DRAIN_TIMEOUT_S = 20.0
ABORT_TIMEOUT_S = 2.0  # for error responses of aborted work
LOG_LEVEL = "warning"
CLOSE_TIMEOUT_S = 3  # all three together less than Kubernetes' grace period of 30 s


def inherited_listeners(descriptor: int | None) -> list[socket.socket] | None:
    """Return the socket of FAASMOE_LISTEN_FD as `Server.run` takes it; None if there is none.

    Raises:
        ValueError: the descriptor is not an open socket; the message names the variable.
    """
    if descriptor is None:
        return None
    try:
        return [socket.socket(fileno=descriptor)]
    except OSError as error:
        raise ValueError(
            f"FAASMOE_LISTEN_FD: got {descriptor}, expected an inherited socket: {error.strerror}"
        ) from error


class DrainMiddleware:
    """ASGI middleware that rejects new work with 503 while the server drains.

    Work is any request with a method in WORK_METHODS; other requests are served to the end, except
    the readiness path, which fails as soon as draining starts.

    Attributes:
        is_draining: whether new work is rejected.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.is_draining = False
        self._app = app
        self._n_in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve or reject one request."""
        is_work = scope["type"] == "http" and scope["method"] in WORK_METHODS
        if self.is_draining and (is_work or scope.get("path") == READINESS_PATH):
            await self._reject(scope, receive, send)
        elif is_work:
            await self._serve_tracked(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _serve_tracked(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._n_in_flight += 1
        self._idle.clear()
        try:
            await self._app(scope, receive, send)
        finally:
            self._n_in_flight -= 1
            if not self._n_in_flight:
                self._idle.set()

    def start_draining(self) -> None:
        """Reject new work from now on."""
        self.is_draining = True

    async def wait_until_idle(self, timeout_s: float) -> bool:
        """Wait until no work is in flight; return False after the timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    async def _reject(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_and_close(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"connection", b"close"))
                message["headers"].append((DRAINING_HEADER.encode(), b"1"))
            await send(message)

        message = "The server is shutting down."
        await send_error(send_and_close, message, status=503, code="service_unavailable")


class ServerConfig(uvicorn.Config):
    """uvicorn's settings, with the loggers of a process as its zygote has set them up.

    To set them up again would write to every logger, and so copy a forked process's pages.
    """

    def configure_logging(self) -> None:
        """Set uvicorn's loggers up, unless they write to this process's stderr already."""
        handlers = logging.getLogger("uvicorn").handlers
        if not any(getattr(handler, "stream", None) is sys.stderr for handler in handlers):
            super().configure_logging()


def prepare_logging() -> None:
    """Set up the loggers of servers that are forked from this process."""
    ServerConfig("", access_log=False, log_level=LOG_LEVEL)


class Server(uvicorn.Server):
    """Serves an app until SIGTERM, SIGINT or `should_exit`.

    Args:
        app: the ASGI app.
        on_drain_timeout: aborts the responses still running after `drain_timeout_s`.
        on_started: called once the app has started and the server listens.
        host: address to listen on.
        port: port to listen on; 0 for any free port.
        path: Unix socket to listen on instead.
        drain_timeout_s: seconds that running responses get to finish.
        connection_limits: how many connections clients may have, and for how long.
        tls: the server's certificate; None serves without TLS.
    """

    def __init__(
        self,
        app: Any,
        *,
        on_drain_timeout: Callable[[], None],
        on_started: Callable[[], None] = lambda: None,
        host: str = "127.0.0.1",
        port: int = 0,
        path: Path | None = None,
        drain_timeout_s: float = DRAIN_TIMEOUT_S,
        connection_limits: ConnectionLimits | None = None,
        tls: TlsFolder | None = None,
    ) -> None:
        self._drain = DrainMiddleware(app)
        limits = connection_limits or ConnectionLimits()
        config = ServerConfig(
            self._drain,
            http=bounded_protocol(limits),  # type: ignore[arg-type]
            timeout_keep_alive=limits.keep_alive_s,  # type: ignore[arg-type]
            host=host,
            port=port,
            uds=None if path is None else str(path),
            ws="none",
            access_log=False,
            log_level=LOG_LEVEL,
            timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
            ssl_context_factory=None if tls is None else lambda *_: tls.server_context(),
        )
        super().__init__(config)
        self._on_started = on_started
        self._on_drain_timeout = on_drain_timeout
        self._drain_timeout_s = drain_timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None  # while it waits for a signal
        self._signaled = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Shut down gracefully on SIGTERM and SIGINT, without re-raising them afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the app, listen and report it."""
        await super().startup(sockets)
        if self.started:
            self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal, on which the main loop ends at once rather than with its next tick."""
        super().handle_exit(sig, frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._signaled.set)

    async def main_loop(self) -> None:
        """Tick until the server is to end."""
        self._loop = asyncio.get_running_loop()
        n_ticks = 0
        while not await self.on_tick(n_ticks):
            n_ticks += 1
            with suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._signaled.wait()
        self._loop = None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain: reject work, wait for running responses, abort the rest, then close."""
        self._drain.start_draining()
        if not await self._drain.wait_until_idle(self._drain_timeout_s):
            self._on_drain_timeout()
            await self._drain.wait_until_idle(ABORT_TIMEOUT_S)
        if self.server_state.connections or self.server_state.tasks:
            await super().shutdown(sockets)
            return
        for listener in (*self.servers, *(sockets or ())):  # uvicorn would wait a while
            listener.close()
        await self.lifespan.shutdown()
