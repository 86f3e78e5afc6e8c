import asyncio
from typing import Any

import httpx
import openai
import pytest

from faasmoe_router.api.app import create_app
from faasmoe_router.engine.cache_config import EngineLimits
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.metrics import EngineMetrics, new_registry


def test_models_are_listed_and_described(client: openai.OpenAI) -> None:
    listed = client.models.list().data
    assert [(model.id, model.object) for model in listed] == [("tiny", "model")]
    described = client.models.retrieve("tiny")
    assert described == listed[0]
    assert described.model_extra is not None
    assert described.model_extra["max_model_len"] == 256


def test_health_and_version_answer(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert set(http.get("/version").json()) == {"version"}


def test_an_engine_that_does_not_run_is_not_healthy(base_model: Any, codec: ModelTokenizer) -> None:
    registry = new_registry()
    engine = Engine(
        base_model,
        codec,
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


def test_metrics_have_vllms_names(http: httpx.Client) -> None:
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
    ):
        assert sample in response.text


def test_a_request_id_is_echoed(http: httpx.Client) -> None:
    response = http.get("/health", headers={"X-Request-Id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"


@pytest.mark.parametrize("given", ["", "a" * 129, "a b", "<script>"])
def test_a_request_id_is_made_where_none_is_usable(http: httpx.Client, given: str) -> None:
    made = {http.get("/health", headers={"X-Request-Id": given}).headers["x-request-id"]}
    made.add(http.get("/nothing").headers["x-request-id"])
    assert len(made) == 2
    assert all(len(request_id) == 32 for request_id in made)
