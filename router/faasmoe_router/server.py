"""The end of a server, as its clients see it: what runs is finished, nothing is begun.

From the moment that the end is asked for, the server is not ready and refuses new work by a 503
that says when to come again, at a place that still listens: a client that is refused a connection
could not tell the end from a fault.

The HTTP server: uvicorn, but it ends quietly and lets no answer hang.

uvicorn closes its listeners at shutdown, waits for running answers and then cuts them. Here it goes
on to listen while they finish, and says that it ends (`ending.py`); those that take too long are
ended first, each with an error that its client can read. And it ends by returning, not by the
signal it got, so that what comes after it still runs.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from faasmoe_router.api.errors import ApiError

READINESS_PATH = "/health"
WORK_METHODS = ("POST", "PUT", "PATCH", "DELETE")


class DrainMiddleware:
    """ASGI middleware around a whole app.

    Attributes:
        has_begun: whether the end was asked for.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.is_draining = False
        self._app = app
        self._n_in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http" or scope["method"] not in WORK_METHODS:
            if self.is_draining and scope.get("path") == READINESS_PATH:
                await self._reject(scope, receive, send)
            else:
                await self._app(scope, receive, send)
            return
        if self.is_draining:
            await self._reject(scope, receive, send)
            return
        self._n_in_flight += 1
        self._idle.clear()
        try:
            await self._app(scope, receive, send)
        finally:
            self._n_in_flight -= 1
            if not self._n_in_flight:
                self._idle.set()

    def start_draining(self) -> None:
        """Refuse work from now on."""
        self.is_draining = True

    async def wait_until_idle(self, timeout_s: float) -> bool:
        """Wait until no answer runs; return whether that was in time."""
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
            await send(message)

        error = ApiError(
            "The server is shutting down.",
            status=503,
            error_type="server_error",
            code="service_unavailable",
        )
        await error.response()(scope, receive, send_and_close)


DRAIN_TIMEOUT_S = 20.0
ABORT_TIMEOUT_S = 2.0  # for the errors that end what took too long
CLOSE_TIMEOUT_S = 3  # together less than the 30 s after which Kubernetes kills


class Server(uvicorn.Server):
    """Serves an app until SIGTERM, SIGINT or `should_exit`.

    Args:
        app: the ASGI app.
        host: address to listen at.
        port: port to listen at.
        end_running: ends the answers that still run `drain_s` after the end was asked for.
        drain_s: how long answers may go on.
    """

    def __init__(
        self,
        app: Any,
        *,
        on_drain_timeout: Callable[[], None],
        host: str = "127.0.0.1",
        port: int = 0,
        drain_timeout_s: float = DRAIN_TIMEOUT_S,
    ) -> None:
        self._drain = DrainMiddleware(app)
        config = uvicorn.Config(
            self._drain,
            host=host,
            port=port,
            ws="none",
            access_log=False,
            log_level="warning",
            timeout_graceful_shutdown=CLOSE_TIMEOUT_S,
        )
        super().__init__(config)
        self._on_drain_timeout = on_drain_timeout
        self._drain_timeout_s = drain_timeout_s

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT as the wish to end."""
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

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse work, wait for the running answers, end those that take too long, then close."""
        self._drain.start_draining()
        if not await self._drain.wait_until_idle(self._drain_timeout_s):
            self._on_drain_timeout()
            await self._drain.wait_until_idle(ABORT_TIMEOUT_S)
        await super().shutdown(sockets)
