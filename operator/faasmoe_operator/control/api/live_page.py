"""The live page: static files, and a stream of what they draw. Read-only.

The stream has one event per change of a model, at most one a second; an idle model sends only
comments. The page is for who operates the service: it needs a key, or is reached over loopback
alone, where the `Host` header is checked so that no web site can read it by a name of its own that
resolves to this machine (DNS rebinding). What tenants use is shown to whoever has the key.
"""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files

from aiohttp import web

from faasmoe_operator.control.api.live_view import live_view
from faasmoe_operator.control.controller import Controller

PAGE_PATH = "/ui"
MAX_VIEWERS = 32
MIN_INTERVAL_S = 1.0
COMMENT_INTERVAL_S = 15.0
WRITE_TIMEOUT_S = 30.0
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})

_CONTENT_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

ModelList = Callable[[], Sequence[tuple[str, Controller]]]
"""Returns the models that run, by name; a name is NAMESPACE/NAME where there are namespaces."""
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class LivePage:
    """Handlers of the page.

    Args:
        models: the models to show.
        key: the bearer token that its data requires; None for clients on loopback only.
    """

    def __init__(self, models: ModelList, *, key: str | None = None) -> None:
        self._models = models
        self._key = key
        self._n_viewers = 0
        self._closing = asyncio.Event()
        self._files = _read_files()

    def make_app(self) -> web.Application:
        """Return the application."""
        app = web.Application(middlewares=[_add_headers])
        app.add_routes(
            [
                web.get(PAGE_PATH, self._redirect),
                web.get(f"{PAGE_PATH}/", self._file),
                web.get(f"{PAGE_PATH}/models", self._list_models),
                web.get(f"{PAGE_PATH}/events", self._stream_events),
                web.get(f"{PAGE_PATH}/{{file}}", self._file),
            ]
        )
        app.on_shutdown.append(self._close)
        return app

    async def _close(self, _: web.Application) -> None:
        self._closing.set()

    async def _redirect(self, _: web.Request) -> web.Response:
        return web.Response(status=308, headers={"Location": f"{PAGE_PATH}/"})

    async def _file(self, request: web.Request) -> web.Response:
        name = request.match_info.get("file", "index.html")
        if name not in self._files:
            return _refuse(404, f"path: got {request.path}, expected {PAGE_PATH}/")
        suffix = name[name.rindex(".") :]
        return web.Response(body=self._files[name], content_type=_CONTENT_TYPES[suffix])

    async def _list_models(self, request: web.Request) -> web.StreamResponse:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        return web.json_response({"models": [name for name, _ in self._models()]})

    async def _stream_events(self, request: web.Request) -> web.StreamResponse:
        if (refusal := self._refusal(request)) is not None:
            return refusal
        name = request.query.get("model", "")
        controller = dict(self._models()).get(name)
        if controller is None:
            return _refuse(404, f"model: got {name!r}, expected one of {PAGE_PATH}/models")
        if self._n_viewers >= MAX_VIEWERS:
            return _refuse(503, f"more than {MAX_VIEWERS} pages are open")
        self._n_viewers += 1
        try:
            return await self._stream(request, name, controller)
        finally:
            self._n_viewers -= 1

    async def _stream(
        self, request: web.Request, name: str, controller: Controller
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", **_HEADERS})
        await response.prepare(request)
        seen: tuple[int, int] | None = None
        try:
            while not self._closing.is_set() and dict(self._models()).get(name) is controller:
                frame = b": idle\n\n"
                now = (controller.revision, controller.usage_ledger.n_updates)
                if now != seen:
                    seen = now
                    shown = live_view(controller, with_tenants=self._key is not None)
                    frame = b"data: " + json.dumps(shown).encode() + b"\n\n"
                async with asyncio.timeout(WRITE_TIMEOUT_S):
                    await response.write(frame)
                await self._wait_for_change(controller, now[0])
        except (TimeoutError, ConnectionError):
            return response  # the viewer has gone or reads nothing
        return response

    async def _wait_for_change(self, controller: Controller, revision: int) -> None:
        """Wait a second, then for a change, but not longer than until the next comment is due."""
        await self._sleep_unless_closing(asyncio.sleep(MIN_INTERVAL_S))
        await self._sleep_unless_closing(controller.wait_for_change(revision))

    async def _sleep_unless_closing(self, awaitable: Awaitable[object]) -> None:
        tasks = {asyncio.ensure_future(awaitable), asyncio.ensure_future(self._closing.wait())}
        try:
            await asyncio.wait(
                tasks, timeout=COMMENT_INTERVAL_S, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _refusal(self, request: web.Request) -> web.Response | None:
        """Return why the request's data are refused; None if they are not."""
        if self._key is None:
            host = request.headers.get("Host", "")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name.lower() in LOOPBACK_HOSTS:
                return None
            return _refuse(403, f"Host: got {host!r}, expected localhost or 127.0.0.1")
        received = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        if hmac.compare_digest(received, f"Bearer {self._key}".encode()):
            return None
        return _refuse(401, "authorization: expected the live page's key as a bearer token")


def _refuse(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message}}, status=status)


@web.middleware
async def _add_headers(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        response = await handler(request)
    except web.HTTPException as error:
        response = _refuse(error.status, error.reason)
    if not response.prepared:
        response.headers.update(_HEADERS)
    return response


def _read_files() -> dict[str, bytes]:
    folder = files("faasmoe_operator.control.api") / "page"
    return {
        entry.name: entry.read_bytes()
        for entry in folder.iterdir()
        if entry.name.endswith(tuple(_CONTENT_TYPES))
    }
