"""Every refused or failed request is counted by reason, and every reason exists from the start."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from faasmoe_router.api.errors import ApiError, add_error_handlers
from faasmoe_router.api.middleware import RequestContextMiddleware
from faasmoe_router.api.refusals import REASONS, RefusalMetricsMiddleware, refusal_counter
from faasmoe_router.errors import (
    ActivationTimeout,
    EngineQueueFull,
    EngineUnavailable,
    NoTokenAllowed,
    RateLimitExceeded,
    StoreUnreadable,
)

NAME = "faasmoe_router_refused_requests_total"


def counts_after(error: Exception | None, *, path: str = "/v1/x", body: bytes = b"") -> list[str]:
    """Return the reasons counted for one request that raises `error`."""
    registry = CollectorRegistry()
    app = FastAPI()
    app.add_middleware(RequestContextMiddleware, max_body_bytes=100)
    app.add_middleware(RefusalMetricsMiddleware, counter=refusal_counter(registry))
    add_error_handlers(app)

    async def answer() -> None:
        if error is not None:
            raise error

    app.post("/v1/x")(answer)
    app.post("/health")(answer)

    async def send() -> None:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await client.post(path, content=body)

    asyncio.run(send())
    values = {r: registry.get_sample_value(NAME, {"reason": r}) for r in REASONS}
    assert None not in values.values()
    return [reason for reason, value in values.items() if value]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ActivationTimeout("late"), "activation_timed_out"),
        (EngineUnavailable("down"), "engine_unavailable"),
        (StoreUnreadable("gone"), "store_unreadable"),
        (EngineQueueFull("full"), "queue_full"),
        (RateLimitExceeded("slow down", retry_after_s=1.0), "rate_limited"),
        (NoTokenAllowed("grammar"), "invalid_request"),
        (ApiError("bad"), "invalid_request"),
        (ApiError("no", status=501), "not_implemented"),
        (RuntimeError("bug"), "internal_error"),
    ],
)
def test_an_error_response_counts_by_reason(error: Exception, reason: str) -> None:
    assert counts_after(error) == [reason]


def test_a_body_that_is_too_large_counts() -> None:
    assert counts_after(None, body=b"x" * 101) == ["body_too_large"]


def test_success_counts_nothing() -> None:
    assert counts_after(None) == []


def test_probes_count_nothing() -> None:
    assert counts_after(EngineUnavailable("starting"), path="/health") == []
