"""The router's metrics: on a port of their own, apart from what tenants reach, or beside the API.

Metrics name tenants and count their requests. A router whose port is public serves them on another
(`FAASMOE_METRICS_PORT`), on the same event loop, since collectors read what only that loop changes.
Beside the API, a tenant sees its own.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from aiohttp import web
from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CollectorRegistry

from faasmoe_router.api.middleware import get_caller
from faasmoe_router.api.openapi import text_error_responses
from faasmoe_router.metrics import render_metrics
from faasmoe_router.tenants.metrics import OwnMetrics


def metrics_routes(registry: CollectorRegistry) -> APIRouter:
    """Return the route for Prometheus beside the API."""
    router = APIRouter()

    @router.get("/metrics", response_class=PlainTextResponse, responses=text_error_responses(500))
    async def metrics(request: Request) -> Response:
        """Return the metrics as text or OpenMetrics; to a tenant, none of other tenants."""
        tenant = get_caller(request).tenant
        visible = OwnMetrics(registry, tenant) if tenant else registry
        accept = request.headers.get("accept", "")
        body, content_type = render_metrics(visible, accept=accept)
        return Response(body, headers={"Content-Type": content_type})

    return router


class MetricsServer:
    """Serves GET /metrics; an async context manager.

    Args:
        registry: the metrics.
        host: address to listen on.
        port: port to listen on.
    """

    def __init__(self, registry: CollectorRegistry, *, host: str, port: int) -> None:
        self._registry = registry
        self._host = host
        self._port = port
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application()
        app.router.add_get("/metrics", self._respond)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()
        return self

    async def __aexit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _respond(self, request: web.Request) -> web.Response:
        accept = request.headers.get("Accept", "")
        body, content_type = render_metrics(self._registry, accept=accept)
        return web.Response(body=body, headers={"Content-Type": content_type})
