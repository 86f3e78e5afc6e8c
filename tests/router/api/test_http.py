"""HTTP itself: CORS, content encodings, HEAD, and a model name that requests may leave out."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from copy import deepcopy
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
from faasmoe_router.tenants.service import Caller, NoTenants

ORIGIN = "https://chat.example.com"
NAME = "org/tiny"
BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
PREFLIGHT = {
    "Origin": ORIGIN,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
}


class OneKey(NoTenants):
    """Accepts the API key `secret` only."""

    def authenticate(self, tenant: str | None, api_key: str) -> Caller | None:
        return Caller("acme") if api_key == "secret" else None


@pytest.fixture(scope="module")
def url(base_model: Any, model_tokenizer: ModelTokenizer) -> Iterator[str]:
    registry = new_registry()
    engine = Engine(
        deepcopy(base_model),
        model_tokenizer,
        limits=EngineLimits(max_model_len=256, max_num_seqs=4),
        metrics=EngineMetrics(registry, NAME),
    )
    tenancy: Any = OneKey()
    app = create_app(
        engine,
        model_name=NAME,
        registry=registry,
        tenancy=tenancy,
        max_body_bytes=20_000,
        cors_origins=(ORIGIN,),
    )
    server = Server(app, on_drain_timeout=engine.abort_running, drain_timeout_s=0)
    with running_server(server) as base_url:
        yield base_url


@pytest.fixture
def web(url: str) -> Iterator[httpx.Client]:
    headers = {"Authorization": "Bearer secret", "Origin": ORIGIN}
    with httpx.Client(base_url=url, headers=headers, timeout=120) as client:
        yield client


def test_preflight_needs_no_key(url: str) -> None:
    response = httpx.options(f"{url}/v1/chat/completions", headers=PREFLIGHT)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert "x-stainless-os" in response.headers["access-control-allow-headers"]


def test_preflight_of_another_origin_is_refused(url: str) -> None:
    headers = {**PREFLIGHT, "Origin": "https://evil.example"}
    response = httpx.options(f"{url}/v1/chat/completions", headers=headers)
    assert response.status_code == 400
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    ("key", "body", "status"),
    [("secret", BODY, 200), ("wrong", BODY, 401), ("secret", {"messages": 1}, 400)],
)
def test_web_pages_can_read_answers_and_errors(
    web: httpx.Client, key: str, body: Any, status: int
) -> None:
    headers = {"Authorization": f"Bearer {key}"}
    response = web.post("/v1/chat/completions", json=body, headers=headers)
    assert response.status_code == status
    assert response.headers["access-control-allow-origin"] == ORIGIN


def test_without_the_setting_there_is_no_cors(http: httpx.Client) -> None:
    response = http.options("/v1/chat/completions", headers=PREFLIGHT)
    assert response.status_code == 405
    assert "access-control-allow-origin" not in response.headers


def _raw_deflate(data: bytes) -> bytes:
    return zlib.compress(data)


@pytest.mark.parametrize(
    ("encoding", "encode"),
    [
        ("gzip", gzip.compress),
        ("GZIP", gzip.compress),
        ("deflate", _raw_deflate),
    ],
)
def test_compressed_body_is_decoded(
    web: httpx.Client, encoding: str, encode: Callable[[bytes], bytes]
) -> None:
    headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
    body = encode(json.dumps(BODY).encode())
    response = web.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(
    ("encoding", "body", "status", "message"),
    [
        pytest.param("br", b"x", 415, "got br, expected gzip, deflate", id="brotli"),
        pytest.param("gzip", b"{}", 400, "incorrect header check", id="not-gzip"),
        pytest.param("gzip", gzip.compress(b"{}")[:-9], 400, "ends early", id="cut"),
        pytest.param("gzip", gzip.compress(b" " * 9_000_000), 413, "20000 bytes", id="bomb"),
    ],
)
def test_undecodable_body_is_refused_by_name(
    web: httpx.Client, encoding: str, body: bytes, status: int, message: str
) -> None:
    headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
    response = web.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


def test_zstd_body_is_decoded_within_bounds(web: httpx.Client) -> None:
    zstd = pytest.importorskip("backports.zstd")
    wide = {zstd.CompressionParameter.window_log: 27}
    cases: list[tuple[bytes, int, str]] = [
        (zstd.compress(json.dumps(BODY).encode()), 200, "chat.completion"),
        (b"{}" * 9, 400, "could not decode the body"),
        (zstd.compress(b"{}")[:-2], 400, "ends early"),
        (zstd.compress(b" " * 9_000_000), 413, "20000 bytes"),
        (zstd.compress(b" " * (9 << 20), options=wide), 400, "too much memory"),
    ]
    headers = {"Content-Encoding": "zstd", "Content-Type": "application/json"}
    for body, status, text in cases:
        response = web.post("/v1/chat/completions", content=body, headers=headers)
        assert (response.status_code, text in response.text) == (status, True), response.text


@pytest.mark.parametrize("path", ["/health", "/v1/models", f"/v1/models/{NAME}", "/metrics"])
def test_head_is_answered_like_get(web: httpx.Client, path: str) -> None:
    response = web.head(path)
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-type"] == web.get(path).headers["content-type"]
    assert web.head("/v1/chat/completions").status_code == 405


def test_served_name_may_contain_slashes(web: httpx.Client) -> None:
    assert [model["id"] for model in web.get("/v1/models").json()["data"]] == [NAME]
    assert web.get(f"/v1/models/{NAME}").json()["id"] == NAME
    assert web.post("/v1/chat/completions", json={**BODY, "model": NAME}).json()["model"] == NAME


def test_model_is_optional(web: httpx.Client) -> None:
    assert web.post("/v1/chat/completions", json=BODY).json()["model"] == NAME
    text = {"prompt": "hi", "model": None}
    assert web.post("/v1/completions", json=text).json()["model"] == NAME
    other = web.post("/v1/chat/completions", json={**BODY, "model": "other"})
    assert (other.status_code, other.json()["error"]["code"]) == (404, "model_not_found")
