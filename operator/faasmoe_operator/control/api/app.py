"""The control API's routes, who may call them, and what becomes of errors."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable

from aiohttp import web
from aiohttp.typedefs import Middleware

from faasmoe_operator.control.api.bodies import read_load, read_wake
from faasmoe_operator.control.api.errors import Refusal, invalid
from faasmoe_operator.control.api.status import describe, update_gauges
from faasmoe_operator.control.api.stream import stream_table
from faasmoe_operator.control.controller import Controller

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 1 << 20
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(
    controller: Controller, *, token: str, clock: Callable[[], float] = time.time
) -> web.Application:
    """Return the API of a controller that has started.

    Args:
        controller: what is asked and told.
        token: the bearer token that /v1 asks for.
        clock: the time of day.
    """
    return _Api(controller, token=token, clock=clock).app()


class _Api:
    def __init__(self, controller: Controller, *, token: str, clock: Callable[[], float]) -> None:
        self._controller = controller
        self._expected = f"Bearer {token}".encode()
        self._clock = clock
        self._closing = asyncio.Event()

    def app(self) -> web.Application:
        app = web.Application(
            client_max_size=MAX_BODY_BYTES,
            middlewares=[_middleware(self._errors), _middleware(self._authorized)],
        )
        app.add_routes(
            [
                web.get("/v1/table", self._table),
                web.post("/v1/load", self._load),
                web.post("/v1/wake", self._wake),
                web.get("/v1/status", self._status),
                web.get("/metrics", self._metrics),
                web.get("/healthz", self._healthz),
            ]
        )
        app.on_shutdown.append(self._close)
        return app

    async def _close(self, _: web.Application) -> None:
        self._closing.set()

    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except Refusal as error:
            refusal = error
        except web.HTTPException as error:
            refusal = _refusal(error, request)
        self._controller.metrics.refused.labels(refusal.code).inc()
        return refusal.response()

    async def _authorized(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        if request.path.startswith("/v1/") and not hmac.compare_digest(given, self._expected):
            message = "authorization: expected the bearer token"
            raise Refusal(message, status=401, code="unauthorized", field="authorization")
        return await handler(request)

    async def _table(self, request: web.Request) -> web.StreamResponse:
        return await stream_table(request, self._controller.feed, closing=self._closing)

    async def _load(self, request: web.Request) -> web.Response:
        known = self._controller.model.functions
        report = read_load(await request.read(), known=known, now_s=self._clock())
        if self._controller.reports.is_full(report.router):
            raise invalid("router", report.router, "fewer routers")
        self._controller.take(report)
        return web.Response(status=204)

    async def _wake(self, request: web.Request) -> web.Response:
        known = self._controller.model.functions
        functions = read_wake(await request.read(), known=known, now_s=self._clock())
        self._controller.wake(functions)
        return web.Response(status=202)

    async def _status(self, _: web.Request) -> web.Response:
        return web.json_response(await describe(self._controller))

    async def _metrics(self, _: web.Request) -> web.Response:
        update_gauges(self._controller)
        body = self._controller.metrics.text()
        return web.Response(body=body, headers={"Content-Type": METRICS_TYPE})

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})


def _middleware(
    method: Callable[[web.Request, Handler], Awaitable[web.StreamResponse]],
) -> Middleware:
    """Return a method as a middleware; aiohttp marks functions, which methods do not allow."""

    @web.middleware
    async def call(request: web.Request, handler: Handler) -> web.StreamResponse:
        return await method(request, handler)

    return call


def _refusal(error: web.HTTPException, request: web.Request) -> Refusal:
    if error.status == 413:
        message = f"body: expected at most {MAX_BODY_BYTES} bytes"
        return Refusal(message, status=413, code="too_large", field="body")
    if error.status == 404:
        message = f"path: got {request.path}, expected /v1/table, /v1/load, /v1/wake, /v1/status"
        return Refusal(message, status=404, code="not_found", field="path")
    if error.status == 405:
        message = f"method: got {request.method}, which {request.path} does not take"
        return Refusal(message, status=405, code="bad_method", field="method")
    return Refusal(error.reason, status=error.status, code="refused")
