"""HTTP requests are counted by route and class of status, with labels of bounded number."""

import anyio
import pytest
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient
from starlette.types import Message, Scope

from faasmoe_router.api.http_metrics import HttpMetrics, HttpMetricsMiddleware


async def answer(request: Request) -> Response:
    return PlainTextResponse("x", status_code=int(request.query_params.get("status", 200)))


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def app(registry: CollectorRegistry) -> HttpMetricsMiddleware:
    methods = ["GET", "POST", "HEAD"]
    paths = ("/v1/models", "/v1/models/{name:path}", "/v1/chat/completions", "/health")
    inner = Starlette(routes=[Route(path, answer, methods=methods) for path in paths])
    return HttpMetricsMiddleware(inner, metrics=HttpMetrics(registry), routes=inner.routes)


def counts(registry: CollectorRegistry) -> dict[tuple[str, str, str], float]:
    samples = [s for family in registry.collect() for s in family.samples]
    return {
        (s.labels["handler"], s.labels["method"], s.labels["status"]): s.value
        for s in samples
        if s.name == "http_requests_total"
    }


def test_requests_are_counted_by_route_and_status(
    app: HttpMetricsMiddleware, registry: CollectorRegistry
) -> None:
    client = TestClient(app)
    for path in ("/v1/models", "/acme/v1/models", "/v1/models/a/b", "/v1/models/c", "/health"):
        client.get(path)
    for status in (200, 404, 503):
        client.post(f"/v1/chat/completions?status={status}")
    client.get("/nowhere")
    client.request("BREW", "/v1/models")
    chat = "/v1/chat/completions"
    assert counts(registry) == {
        ("/v1/models", "GET", "2xx"): 1,
        ("/v1/models", "GET", "4xx"): 1,  # of a tenant's own path, which this app knows not
        ("/v1/models/{name:path}", "GET", "2xx"): 2,
        (chat, "POST", "2xx"): 1,
        (chat, "POST", "4xx"): 1,
        (chat, "POST", "5xx"): 1,
        ("none", "GET", "4xx"): 1,
        ("/v1/models", "OTHER", "4xx"): 1,
    }
    seconds = registry.get_sample_value(
        "http_request_duration_seconds_count", {"handler": chat, "method": "POST"}
    )
    assert seconds == 3


def test_a_client_that_left_is_no_error_of_the_server(registry: CollectorRegistry) -> None:
    async def leave(*_: object) -> None:
        raise TimeoutError

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(_: Message) -> None:
        return

    metrics = HttpMetrics(registry)
    middleware = HttpMetricsMiddleware(leave, metrics=metrics, routes=[])
    scope: Scope = {"type": "http", "path": "/v1/models", "method": "GET"}

    async def call() -> None:
        with pytest.raises(TimeoutError):
            await middleware(scope, receive, send)

    anyio.run(call)
    assert counts(registry) == {("none", "GET", "4xx"): 1}
