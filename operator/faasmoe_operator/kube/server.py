"""The operator's HTTP server: health checks and metrics, beside the models' control API."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

from faasmoe_contracts.tls import TlsFolder, is_named, models_name

logger = logging.getLogger(__name__)

METRICS_CONTENT_TYPE = "text/plain; version=1.0.0; charset=utf-8"
SHUTDOWN_TIMEOUT_S = 2.0
BACKLOG = 1024


@dataclass(slots=True)
class Readiness:
    """What `/readyz` reports.

    Attributes:
        waiting_for: what the operator waits for, in words; empty once it reconciles.
    """

    waiting_for: str = "the API server"

    @property
    def is_ready(self) -> bool:
        """Whether the operator reconciles models."""
        return not self.waiting_for


@dataclass(frozen=True, slots=True)
class HealthRoutes:
    """Handlers of /healthz and /readyz, and of /metrics, which may have a port of its own.

    Attributes:
        readiness: the operator's readiness.
        render_metrics: returns all metrics in Prometheus's text format.
    """

    readiness: Readiness
    render_metrics: Callable[[], bytes]

    def routes(self) -> list[web.RouteDef]:
        """Return the routes of the health checks."""
        return [web.get("/healthz", self._healthz), web.get("/readyz", self._readyz)]

    def metrics_routes(self) -> list[web.RouteDef]:
        """Return the route of the metrics, which tell what every model and tenant does."""
        return [web.get("/metrics", self._metrics)]

    async def _healthz(self, _: web.Request) -> web.Response:
        """Answer 200: it shows that the event loop runs."""
        return web.json_response({"status": "ok"})

    async def _readyz(self, _: web.Request) -> web.Response:
        if self.readiness.is_ready:
            return web.json_response({"status": "ok"})
        body = {"status": "starting", "waits_for": self.readiness.waiting_for}
        return web.json_response(body, status=503)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=self.render_metrics(), headers={"Content-Type": METRICS_CONTENT_TYPE}
        )


@web.middleware
async def require_models_certificate(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Refuse requests about a namespace's models from whoever has no certificate of its models."""
    _, part, namespace, *_ = (*request.path.split("/"), "", "")
    if part == "models":
        expected = models_name(namespace)
        connection = None if request.transport is None else request.transport
        if connection is None or not is_named(connection.get_extra_info("ssl_object"), {expected}):
            error = {
                "code": "no_certificate",
                "message": f"certificate: expected one of {expected}",
                "field": "certificate",
            }
            return web.json_response({"error": error}, status=403)
    return await handler(request)


async def start_server(
    app: web.Application, *, host: str, port: int, tls: TlsFolder | None = None
) -> web.AppRunner:
    """Start to serve an application until its runner is cleaned up; raises OSError.

    Args:
        app: the application.
        host: address to listen on.
        port: port to listen on.
        tls: the server's certificate; None serves without TLS.
    """
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_TIMEOUT_S)
    await runner.setup()
    context = None if tls is None else tls.server_context()
    site = web.TCPSite(runner, host, port, reuse_address=True, backlog=BACKLOG, ssl_context=context)
    await site.start()
    logger.info("listening on %s:%d", host, port)
    return runner
