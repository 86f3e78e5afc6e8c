"""Metrics of HTTP requests, under the names and labels of vLLM's server, which its dashboards read.

The label `handler` is a route's path, never a client's, and `none` without a route; `method` is one
that HTTP defines, or `OTHER`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from faasmoe_router.api.middleware import split_tenant_path
from faasmoe_router.api.openapi import UNAUTHENTICATED_PATHS

PROBES = UNAUTHENTICATED_PATHS | {"/metrics"}
NO_ROUTE = "none"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})
DURATION_BUCKETS_S = (0.1, 0.5, 1.0)
DISCONNECTED = 499
"""Status of a request whose client left before the response began, as nginx counts it."""


class HttpMetrics:
    """Counts requests and their durations, streams to their end.

    Args:
        registry: where to register the metrics.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "http_requests_total",
            "Requests by route, method and class of status; probes excluded.",
            ["handler", "method", "status"],
            registry=registry,
        )
        self._durations_s = Histogram(
            "http_request_duration_seconds",
            "Time from a request's head to the end of its response, probes excluded.",
            ["handler", "method"],
            buckets=DURATION_BUCKETS_S,
            registry=registry,
        )

    def record(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Record a request that has ended."""
        method = method if method in METHODS else "OTHER"
        self._requests.labels(handler, method, f"{status // 100}xx").inc()
        self._durations_s.labels(handler, method).observe(seconds)


class HttpMetricsMiddleware:
    """ASGI middleware that records every request but those of probes.

    Args:
        app: the wrapped ASGI app.
        metrics: where to record them.
        routes: the app's routes, complete when the first request arrives.
    """

    def __init__(self, app: ASGIApp, *, metrics: HttpMetrics, routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        record = _Record(self._metrics, self._handler(scope["path"]), scope["method"])

        async def note_and_send(message: Message) -> None:
            record.note(message)
            await send(message)

        try:
            await self._app(scope, receive, note_and_send)
        finally:
            record.end()

    def _handler(self, path: str) -> str:
        """Return the path of the route that serves a path, tenants' prefixes removed."""
        _, path = split_tenant_path(path)
        for route in self._routes:
            if isinstance(route, Route) and route.path_regex.match(path):
                return route.path
        return NO_ROUTE


class _Record:
    """One request, recorded before its client can have read the end of its response."""

    def __init__(self, metrics: HttpMetrics, handler: str, method: str) -> None:
        self._metrics, self._handler, self._method = metrics, handler, method
        self._start_s = time.perf_counter()
        self._status = DISCONNECTED
        self._is_recorded = False

    def note(self, message: Message) -> None:
        """Note a message of the response."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            self.end()

    def end(self) -> None:
        """Record the request, unless it has been."""
        if not self._is_recorded:
            self._is_recorded = True
            seconds = time.perf_counter() - self._start_s
            self._metrics.record(self._handler, self._method, self._status, seconds)
