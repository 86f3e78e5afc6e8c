"""Counts requests that were refused or failed before a response began, by reason.

An outage that the engine never sees, such as functions that cannot be activated, shows here: the
engine's own metrics count only requests that reached it. Aggregates only; no label names a tenant.
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from faasmoe_router.api.openapi import UNAUTHENTICATED_PATHS
from faasmoe_router.errors import (
    ActivationQueueFull,
    ActivationTimeout,
    EngineQueueFull,
    EngineUnavailable,
    GenerationFailed,
    ModelPartUnavailable,
    NoTokenAllowed,
    RateLimitExceeded,
    RequestTooLarge,
    RouterError,
    StoreCorrupted,
    StoreUnreadable,
    TenantQueueFull,
)

REASON_BY_ERROR: Mapping[type[RouterError], str] = {
    RateLimitExceeded: "rate_limited",
    TenantQueueFull: "tenant_queue_full",
    EngineQueueFull: "queue_full",
    ActivationQueueFull: "activation_queue_full",
    ActivationTimeout: "activation_timed_out",
    EngineUnavailable: "engine_unavailable",
    StoreUnreadable: "store_unreadable",
    StoreCorrupted: "store_corrupted",
    NoTokenAllowed: "invalid_request",
    RequestTooLarge: "invalid_request",
    ModelPartUnavailable: "store_unreadable",
    GenerationFailed: "generation_failed",
}
"""Reason of each router error; the first matching class wins."""

REASON_BY_STATUS: Mapping[int, str] = {
    401: "unauthenticated",
    413: "body_too_large",
    429: "rate_limited",
    501: "not_implemented",
    503: "engine_unavailable",
}
REASONS = tuple(
    dict.fromkeys(
        (
            *REASON_BY_ERROR.values(),
            *REASON_BY_STATUS.values(),
            "invalid_request",
            "internal_error",
        )
    )
)
_SCOPE_KEY = "faasmoe_refusal_reason"


def refusal_counter(registry: CollectorRegistry) -> Counter:
    """Return the counter of refused and failed requests; every reason exists at 0."""
    counter = Counter(
        "faasmoe_router_refused_requests_total",
        "Requests answered with an error before a response began, by reason.",
        ["reason"],
        registry=registry,
    )
    for reason in REASONS:
        counter.labels(reason)
    return counter


def set_refusal_reason(scope: Scope, error: RouterError) -> None:
    """Tell the middleware around the app which error a request ended with."""
    reason = next((r for kind, r in REASON_BY_ERROR.items() if isinstance(error, kind)), None)
    if reason is not None and _SCOPE_KEY in scope:
        scope[_SCOPE_KEY].append(reason)


class RefusalMetricsMiddleware:
    """ASGI middleware, outermost, that counts error responses to requests of the API.

    Args:
        app: the wrapped ASGI app.
        counter: counter with the label `reason`.
    """

    def __init__(self, app: ASGIApp, *, counter: Counter) -> None:
        self._app = app
        self._counter = counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http" or scope["path"] in UNAUTHENTICATED_PATHS:
            await self._app(scope, receive, send)
            return
        reasons: list[str] = []

        async def count_and_send(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                reason = reasons[-1] if reasons else _reason_of_status(message["status"])
                self._counter.labels(reason).inc()
            await send(message)

        await self._app({**scope, _SCOPE_KEY: reasons}, receive, count_and_send)


def _reason_of_status(status: int) -> str:
    return REASON_BY_STATUS.get(status, "invalid_request" if status < 500 else "internal_error")
