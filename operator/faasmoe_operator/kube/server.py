"""The operator's HTTP server: health, metrics, and the control API of every model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web

from faasmoe_operator.kube.readiness import Readiness

logger = logging.getLogger(__name__)

METRICS_TYPE = "text/plain; version=1.0.0; charset=utf-8"
SHUTDOWN_S = 2.0
BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class Front:
    """What the server answers with.

    Attributes:
        readiness: whether models are looked after.
        metrics: gives all metrics.
    """

    readiness: Readiness
    metrics: Callable[[], bytes]

    def routes(self) -> list[web.RouteDef]:
        """Return the routes beside the models' own."""
        return [
            web.get("/healthz", self._healthz),
            web.get("/readyz", self._readyz),
            web.get("/metrics", self._metrics),
        ]

    async def _healthz(self, _: web.Request) -> web.Response:
        """Say that the process lives: that its loop turns is what this shows."""
        return web.json_response({"status": "ok"})

    async def _readyz(self, _: web.Request) -> web.Response:
        if self.readiness.is_ready:
            return web.json_response({"status": "ok"})
        body = {"status": "starting", "waits_for": self.readiness.waits_for}
        return web.json_response(body, status=503)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=self.metrics(), headers={"Content-Type": METRICS_TYPE})


async def listen(app: web.Application, *, host: str, port: int) -> web.AppRunner:
    """Serve an application until its runner is cleaned up; raises OSError."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    site = web.TCPSite(runner, host, port, reuse_address=True, backlog=BACKLOG)
    await site.start()
    logger.info("the operator listens on %s:%d", host, port)
    return runner
