"""What an operator still waits for before it looks after models; empty when it does.

The operator's HTTP server: health, metrics, and the control API of every model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Readiness:
    """Told by `/readyz`.

    Attributes:
        waits_for: what is still missing, in words; empty once models are looked after.
    """

    waiting_for: str = "the API server"

    @property
    def is_ready(self) -> bool:
        """Whether models are looked after."""
        return not self.waiting_for


METRICS_CONTENT_TYPE = "text/plain; version=1.0.0; charset=utf-8"
SHUTDOWN_TIMEOUT_S = 2.0
BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class HealthRoutes:
    """What the server answers with.

    Attributes:
        readiness: whether models are looked after.
        metrics: gives all metrics.
    """

    readiness: Readiness
    render_metrics: Callable[[], bytes]

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
        body = {"status": "starting", "waits_for": self.readiness.waiting_for}
        return web.json_response(body, status=503)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(
            body=self.render_metrics(), headers={"Content-Type": METRICS_CONTENT_TYPE}
        )


async def start_server(app: web.Application, *, host: str, port: int) -> web.AppRunner:
    """Serve an application until its runner is cleaned up; raises OSError."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_TIMEOUT_S)
    await runner.setup()
    site = web.TCPSite(runner, host, port, reuse_address=True, backlog=BACKLOG)
    await site.start()
    logger.info("listening on %s:%d", host, port)
    return runner
