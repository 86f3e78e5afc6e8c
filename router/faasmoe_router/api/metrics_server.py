"""The router's metrics on a port of their own, apart from what tenants can reach.

Metrics name tenants and count their requests. A router whose port is public serves them here
(`FAASMOE_METRICS_PORT`), on the same event loop, since collectors read what only that loop changes.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from aiohttp import web
from prometheus_client import CollectorRegistry

from faasmoe_router.metrics import render_metrics


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
