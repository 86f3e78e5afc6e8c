"""A router tells its front, and nobody else, that a request is prepared."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from server_thread import running_server

from faasmoe_gateway.server import Server
from faasmoe_router.api.app import create_app
from faasmoe_router.engine.batcher import EngineLimits
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.tokenizer import ModelTokenizer
from faasmoe_router.metrics import EngineMetrics, new_registry

DEADLINE_S = 120.0
INTERIM = b"HTTP/1.1 102 Processing\r\n\r\n"
FRONT = "X-FaaSMoE-Front: secret\r\n"


@pytest.fixture(scope="module")
def url(base_model: Any, model_tokenizer: ModelTokenizer) -> Iterator[str]:
    registry = new_registry()
    limits = EngineLimits(max_model_len=256, max_num_seqs=2, max_waiting=2)
    metrics = EngineMetrics(registry, "tiny")
    engine = Engine(base_model, model_tokenizer, limits=limits, metrics=metrics)
    app = create_app(engine, model_name="tiny", registry=registry, front_token="secret")
    server = Server(app, on_drain_timeout=engine.abort_running, drain_timeout_s=0)
    with running_server(server) as url:
        yield url


def ask(url: str, path: str, headers: str, **fields: Any) -> bytes:
    """Return all that is received for a request."""
    body = json.dumps({"model": "tiny", **fields}).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n{headers}"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    address = httpx.URL(url)
    parts = []
    with socket.create_connection((address.host, address.port), DEADLINE_S) as connection:
        connection.sendall(head.encode() + body)
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "the quick"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the quick"}]}),
    ],
)
def test_a_front_learns_that_a_request_is_prepared(
    url: str, path: str, fields: dict[str, Any], stream: bool
) -> None:
    received = ask(url, path, FRONT, max_tokens=2, stream=stream, **fields)
    assert received.startswith(INTERIM + b"HTTP/1.1 200 ")
    assert received.count(INTERIM) == 1
    assert ask(url, path, "", max_tokens=2, stream=stream, **fields).startswith(b"HTTP/1.1 200 ")


def test_a_refusal_says_it_itself(url: str) -> None:
    assert ask(url, "/v1/completions", FRONT, prompt=3).startswith(b"HTTP/1.1 400 ")
