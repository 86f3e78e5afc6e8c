"""A request whose client has left is dropped before, during and after its preparation."""

import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest

from faasmoe_gateway.http_protocol import BoundedHttpProtocol
from faasmoe_router.api import preparation
from faasmoe_router.engine.engine import Engine
from faasmoe_router.engine.tokenizer import ModelTokenizer

DEADLINE_S = 120.0
BODY = '{"model":"tiny","prompt":"the quick","max_tokens":2}'
REQUEST = (
    "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(BODY)}\r\n\r\n{BODY}"
).encode()


def wait_until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.005)


@pytest.fixture
def lost_connections(monkeypatch: pytest.MonkeyPatch) -> list[BoundedHttpProtocol]:
    """The connections that the server has found closed."""
    lost: list[BoundedHttpProtocol] = []
    connection_lost = BoundedHttpProtocol.connection_lost

    def record(self: BoundedHttpProtocol, exc: Exception | None) -> None:
        connection_lost(self, exc)
        lost.append(self)

    monkeypatch.setattr(BoundedHttpProtocol, "connection_lost", record)
    return lost


def test_abandoned_requests_are_neither_tokenized_nor_submitted(
    http: httpx.Client,
    server: tuple[str, Engine],
    monkeypatch: pytest.MonkeyPatch,
    lost_connections: list[BoundedHttpProtocol],
) -> None:
    url, engine = server
    running, release, n_encoded, n_generated = threading.Semaphore(0), threading.Event(), [0], [0]
    encode, generate = ModelTokenizer.encode, engine.generate

    def blocking_encode(self: ModelTokenizer, text: str, **options: Any) -> list[int]:
        n_encoded[0] += 1
        running.release()
        release.wait(DEADLINE_S)
        return encode(self, text, **options)

    def counting_generate(requests: Sequence[Any], **options: Any) -> Any:
        n_generated[0] += 1
        return generate(requests, **options)

    monkeypatch.setattr(ModelTokenizer, "encode", blocking_encode)
    monkeypatch.setattr(engine, "generate", counting_generate)
    monkeypatch.setattr(preparation, "INLINE_BYTES", 0)
    address = (httpx.URL(url).host, httpx.URL(url).port)
    connections = [socket.create_connection(address, timeout=DEADLINE_S) for _ in range(30)]
    for connection in connections:
        connection.sendall(REQUEST)
    for _ in range(preparation.MAX_CONCURRENT_PREPARATIONS):
        assert running.acquire(timeout=DEADLINE_S)
    for connection in connections:
        connection.close()
    wait_until(lambda: len(lost_connections) == len(connections))  # found out by a probe
    release.set()
    assert http.post("/v1/completions", content=BODY, headers=JSON).status_code == 200
    assert n_generated == [1]
    assert n_encoded[0] <= preparation.MAX_CONCURRENT_PREPARATIONS + 1


JSON = {"Content-Type": "application/json"}
