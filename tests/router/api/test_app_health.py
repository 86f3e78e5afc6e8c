import asyncio
import copy
import linecache
from typing import Any

import httpx
import openai
import pytest
from faasmoe_up import free_port

from faasmoe_router.api.app import create_app
from faasmoe_router.api.metrics_server import MetricsServer
from faasmoe_router.engine.batcher import EngineLimits
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.metrics import EngineMetrics, new_registry


def test_models_are_listed_and_described(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [(model.id, model.object) for model in models] == [("tiny", "model")]
    model = client.models.retrieve("tiny")
    assert model == models[0]
    assert model.model_extra is not None
    assert model.model_extra["max_model_len"] == 256


def test_health_and_version_return_json(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert set(http.get("/version").json()) == {"version"}


def test_health_and_chat_return_503_while_engine_is_not_running(
    base_model: Any, model_tokenizer: ModelTokenizer
) -> None:
    registry = new_registry()
    engine = Engine(
        base_model,
        model_tokenizer,
        limits=EngineLimits(max_model_len=256),
        metrics=EngineMetrics(registry, "tiny"),
    )
    app = create_app(engine, model_name="tiny", registry=registry)

    async def get() -> tuple[httpx.Response, httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
            body = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
            return await client.get("/health"), await client.post("/v1/chat/completions", json=body)

    health, chat = asyncio.run(get())
    assert health.status_code == chat.status_code == 503
    assert chat.json()["error"]["code"] == "service_unavailable"
    assert chat.headers["retry-after"] == "1"


def test_metrics_have_vllm_names(http: httpx.Client) -> None:
    http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 3})
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    for sample in (
        'vllm:num_requests_running{model_name="tiny"} 0.0',
        'vllm:num_requests_waiting{model_name="tiny"} 0.0',
        'vllm:prompt_tokens_total{model_name="tiny"}',
        'vllm:generation_tokens_total{model_name="tiny"}',
        'vllm:request_success_total{finished_reason="length",model_name="tiny"}',
        'vllm:time_to_first_token_seconds_bucket{le="0.001",model_name="tiny"}',
        'vllm:inter_token_latency_seconds_count{model_name="tiny"}',
        'vllm:e2e_request_latency_seconds_sum{model_name="tiny"}',
        "process_resident_memory_bytes",
        'http_requests_total{handler="/v1/completions",method="POST",status="2xx"}',
    ):
        assert sample in response.text


def test_valid_request_id_is_echoed(http: httpx.Client) -> None:
    response = http.get("/health", headers={"X-Request-Id": "client-1"})
    assert response.headers["x-request-id"] == "client-1"


@pytest.mark.parametrize("request_id", ["", "a" * 129, "a b", "<script>"])
def test_invalid_request_id_is_replaced(http: httpx.Client, request_id: str) -> None:
    response = http.get("/health", headers={"X-Request-Id": request_id})
    without_id = http.get("/nothing")
    generated = {response.headers["x-request-id"], without_id.headers["x-request-id"]}
    assert len(generated) == 2
    assert all(len(request_id) == 32 for request_id in generated)


def test_metrics_can_have_a_port_of_their_own(
    base_model: Any, model_tokenizer: ModelTokenizer
) -> None:
    registry = new_registry()
    engine = Engine(
        base_model,
        model_tokenizer,
        limits=EngineLimits(max_model_len=256),
        metrics=EngineMetrics(registry, "tiny"),
    )
    port = free_port()
    metrics_server = MetricsServer(registry, host="127.0.0.1", port=port)
    app = create_app(engine, model_name="tiny", registry=registry, metrics_server=metrics_server)

    async def get() -> tuple[httpx.Response, httpx.Response]:
        transport = httpx.ASGITransport(app)
        async with metrics_server, httpx.AsyncClient(transport=transport) as client:
            public = await client.get("http://router/metrics")
            async with httpx.AsyncClient() as scraper:
                return public, await scraper.get(f"http://127.0.0.1:{port}/metrics")

    public, private = asyncio.run(get())
    assert public.status_code == 404
    assert 'vllm:num_requests_running{model_name="tiny"} 0.0' in private.text


def test_neither_start_nor_first_request_reads_sources(
    base_model: Any, model_tokenizer: ModelTokenizer
) -> None:
    """A router of a zygote would take 10 ms and pages of its own for them."""
    registry = new_registry()
    engine = Engine(
        copy.deepcopy(base_model),
        model_tokenizer,
        limits=EngineLimits(max_model_len=256),
        metrics=EngineMetrics(registry, "tiny"),
    )
    app = create_app(engine, model_name="tiny", registry=registry)

    async def complete() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://router") as client,
        ):
            body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
            return await client.post("/v1/completions", json=body)

    linecache.clearcache()
    assert asyncio.run(complete()).status_code == 200
    assert not [name for name in linecache.cache if name.endswith(".py")]
