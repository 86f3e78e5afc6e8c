"""The end of a server, as its clients see it: what runs is finished, nothing is begun.

From the moment that the end is asked for, the server is not ready and refuses new work by a 503
that says when to come again, at a place that still listens: a client that is refused a connection
could not tell the end from a fault.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from faasmoe_router.api.errors import ApiError

READINESS = "/health"
WORK = ("POST", "PUT", "PATCH", "DELETE")


class Ending:
    """ASGI middleware around a whole app.

    Attributes:
        has_begun: whether the end was asked for.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.has_begun = False
        self._app = app
        self._n_running = 0
        self._quiet = asyncio.Event()
        self._quiet.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        if scope["type"] != "http" or scope["method"] not in WORK:
            if self.has_begun and scope.get("path") == READINESS:
                await self._refuse(scope, receive, send)
            else:
                await self._app(scope, receive, send)
            return
        if self.has_begun:
            await self._refuse(scope, receive, send)
            return
        self._n_running += 1
        self._quiet.clear()
        try:
            await self._app(scope, receive, send)
        finally:
            self._n_running -= 1
            if not self._n_running:
                self._quiet.set()

    def begin(self) -> None:
        """Refuse work from now on."""
        self.has_begun = True

    async def wait_until_quiet(self, timeout_s: float) -> bool:
        """Wait until no answer runs; return whether that was in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._quiet.wait()
        except TimeoutError:
            return False
        return True

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"connection", b"close"))
            await send(message)

        refusal = ApiError(
            "The server is shutting down.",
            status=503,
            kind="server_error",
            code="service_unavailable",
        )
        await refusal.response()(scope, receive, send_last)
