"""No body stalls the event loop, whatever is in it; the loop answers probes meanwhile."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from core_waits import Stopwatch
from server_thread import running_server

from faasmoe_gateway.server import Server
from faasmoe_router.api.app import create_app
from faasmoe_router.api.body_limits import MAX_BODY_BYTES
from faasmoe_router.engine.batcher import EngineLimits
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.metrics import EngineMetrics, new_registry

DEADLINE_S = 120.0
MAX_STALL_S = 0.25  # 0.05 on a quiet machine (`make attack`); without limits these took seconds
TICK_S = 0.002
CHAT = '{"model":"tiny","messages":[{"role":"user","content":"a"}],'

BODIES: dict[str, tuple[str, Callable[[], str]]] = {
    "empty-messages": (
        "/v1/chat/completions",
        lambda: '{"model":"tiny","messages":[' + "{}," * 240_000 + "{}]}",
    ),
    "invalid-messages": (
        "/v1/chat/completions",
        lambda: '{"model":"tiny","messages":[' + '{"role":1},' * 30_000 + "{}]}",
    ),
    "messages": (
        "/v1/chat/completions",
        lambda: (
            '{"model":"tiny","messages":['
            + '{"role":"user","content":"a"},' * 2047
            + '{"role":"user","content":"a"}]}'
        ),
    ),
    "unknown-field": (
        "/v1/chat/completions",
        lambda: CHAT + '"foo":[' + "[]," * 1_000_000 + "[]]}",
    ),
    "unknown-numbers": (
        "/v1/chat/completions",
        lambda: CHAT + '"foo":[' + "1," * 250_000 + "1]}",
    ),
    "token-ids": (
        "/v1/completions",
        lambda: '{"model":"tiny","prompt":[' + "1," * 4_000_000 + "1]}",
    ),
    "token-ids-within-the-limit": (
        "/v1/completions",
        lambda: '{"model":"tiny","prompt":[' + "1," * 250_000 + "1]}",
    ),
    "logit-bias": (
        "/v1/chat/completions",
        lambda: CHAT + '"logit_bias":{' + ",".join(f'"{i}":1' for i in range(650_000)) + "}}",
    ),
    "logit-bias-within-the-limit": (
        "/v1/chat/completions",
        lambda: CHAT + '"logit_bias":{' + ",".join(f'"{i}":1' for i in range(100_000)) + "}}",
    ),
    "detokenize": ("/v1/detokenize", lambda: '{"tokens":[' + "1," * 4_000_000 + "1]}"),
    "detokenize-most": ("/v1/detokenize", lambda: '{"tokens":[' + "1," * 65_535 + "1]}"),
    "long-text": (
        "/v1/completions",
        lambda: json.dumps({"model": "tiny", "prompt": "the quick brown é " * 120_000}),
    ),
    "escapes": ("/v1/completions", lambda: '{"model":"tiny","prompt":"' + "\\n" * 4_000_000 + '"}'),
    "wrong-type": ("/v1/chat/completions", lambda: CHAT + '"seed":"' + "x" * 7_000_000 + '"}'),
    "schema": (
        "/v1/chat/completions",
        lambda: CHAT + '"guided_json":{"enum":[' + '"a",' * 200_000 + '"b"]}}',
    ),
}


@dataclass
class Heartbeat:
    """Measures the longest time between two turns of an event loop, and the most CPU time.

    Unlike elapsed time, CPU time does not grow with what else the machine does.
    """

    app: Any
    loop: asyncio.AbstractEventLoop | None = None
    max_stall_s: float = 0.0
    max_stall_cpu_s: float = 0.0
    _last_s: float = 0.0
    _last_cpu_s: float = 0.0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if self.loop is None:
            self.loop = asyncio.get_running_loop()
            self._last_s, self._last_cpu_s = time.monotonic(), time.thread_time()
            self._beat()
        await self.app(scope, receive, send)

    def reset(self) -> None:
        self.max_stall_s = self.max_stall_cpu_s = 0.0

    def _beat(self) -> None:
        assert self.loop is not None
        now_s, now_cpu_s = time.monotonic(), time.thread_time()
        self.max_stall_s = max(self.max_stall_s, now_s - self._last_s - TICK_S)
        self.max_stall_cpu_s = max(self.max_stall_cpu_s, now_cpu_s - self._last_cpu_s)
        self._last_s, self._last_cpu_s = now_s, now_cpu_s
        self.loop.call_later(TICK_S, self._beat)


@contextmanager
def measured_server(model: Any, tokenizer: ModelTokenizer) -> Iterator[tuple[str, Heartbeat]]:
    registry = new_registry()
    engine = Engine(
        model,
        tokenizer,
        limits=EngineLimits(max_model_len=1024, max_num_seqs=4, max_waiting=8),
        metrics=EngineMetrics(registry, "tiny"),
    )
    app = create_app(engine, model_name="tiny", registry=registry, max_body_bytes=MAX_BODY_BYTES)
    heartbeat = Heartbeat(app)
    server = Server(heartbeat, on_drain_timeout=engine.abort_running, drain_timeout_s=0)
    with running_server(server) as url:
        yield url, heartbeat


@pytest.fixture(scope="module")
def measured(
    base_model: Any, model_tokenizer: ModelTokenizer
) -> Iterator[tuple[httpx.Client, Heartbeat]]:
    with (
        measured_server(deepcopy(base_model), model_tokenizer) as (url, heartbeat),
        httpx.Client(base_url=url, timeout=DEADLINE_S) as client,
    ):
        client.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 1})
        yield client, heartbeat


@pytest.mark.parametrize("name", BODIES)
def test_no_body_stalls_the_event_loop(measured: tuple[httpx.Client, Heartbeat], name: str) -> None:
    client, heartbeat = measured
    path, make_body = BODIES[name]
    content = make_body().encode()
    heartbeat.reset()
    stopwatch = Stopwatch()
    response = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert client.get("/ping").status_code == 200
    print(name, response.status_code, f"{heartbeat.max_stall_s * 1000:.0f} ms")
    assert response.status_code == (200 if name == "detokenize-most" else response.status_code)
    assert response.status_code in (200, 400, 413), response.text
    assert heartbeat.max_stall_cpu_s < MAX_STALL_S
    assert heartbeat.max_stall_s - stopwatch.waited_s() < MAX_STALL_S
