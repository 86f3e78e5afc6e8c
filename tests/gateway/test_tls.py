"""TLS between gateways and what they call: a router's server, and the operator's link."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_thread import running_server
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from tests.gateway.test_relay import BODY, Client, run
from tls_folders import (
    MODELS,
    OTHER_ROOT_KEY,
    tls_options,
    tls_peer,
    write_tls_folder,
)

from faasmoe_contracts.gateway_file import GatewayFile, ModelEntry, RouterEntry
from faasmoe_contracts.json_reader import ContractError
from faasmoe_contracts.tls import GATEWAY_NAME, TlsFolder, TlsPeer, models_name
from faasmoe_gateway import upstream
from faasmoe_gateway.app import GatewayApp
from faasmoe_gateway.demand_reporter import DemandReporter
from faasmoe_gateway.model_routes import ModelRoute
from faasmoe_gateway.relay import RouterAddress
from faasmoe_gateway.server import Server
from faasmoe_router.api.resumption import ResumptionMiddleware

FRONT_TOKEN = "front"
DEADLINE_S = 120.0


async def complete(request: Request) -> JSONResponse:
    body = await request.body()
    return JSONResponse({"got": body.decode(), "front": request.scope["state"].get("has_front")})


async def stream(request: Request) -> StreamingResponse:
    async def parts() -> Any:
        for number in range(200):
            yield b"%d\n" % number

    return StreamingResponse(parts())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tls_folder(tmp_path / "router", MODELS)


@pytest.fixture
def router(folder: Path) -> Iterator[str]:
    """A router's server with its middleware for gateways; returns HOST:PORT."""
    app = Starlette(
        routes=[
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/stream", stream),
            Route("/health", lambda _: JSONResponse({})),
        ]
    )
    app.add_middleware(ResumptionMiddleware, front_token=FRONT_TOKEN)
    server = Server(app, on_drain_timeout=lambda: None, tls=TlsFolder(folder))
    with running_server(server) as url:
        yield url.removeprefix("http://")


@pytest.fixture
def gateway(tmp_path: Path) -> TlsPeer:
    return tls_peer(tmp_path / "gateway", GATEWAY_NAME)


def relay(address: str, tls: TlsPeer | None, *, hold_s: float = DEADLINE_S) -> Client:
    """Send one request through a gateway."""
    client = Client(x_faasmoe_other="1")

    async def work() -> None:
        app = GatewayApp(RouterAddress(address, FRONT_TOKEN, hold_s, tls))
        await app(client.scope, client.receive, client.send)

    run(work)
    return client


def test_a_gateway_is_known_by_token_and_certificate(router: str, gateway: TlsPeer) -> None:
    client = relay(router, gateway)
    assert client.status == 200
    assert json.loads(client.body) == {"got": BODY.decode(), "front": True}


def test_the_token_without_the_certificate_is_refused(router: str, tmp_path: Path) -> None:
    other = tls_peer(tmp_path / "other", models_name("other"))
    assert relay(router, other).status == 403
    kubelet = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    kubelet.check_hostname, kubelet.verify_mode = False, ssl.CERT_NONE
    with httpx.Client(verify=kubelet, trust_env=False, timeout=DEADLINE_S) as http:
        assert http.get(f"https://{router}/health").status_code == 200
        refused = http.post(
            f"https://{router}/v1/completions", json={}, headers={"x-faasmoe-front": FRONT_TOKEN}
        )
    assert refused.status_code == 403


def test_a_router_that_is_another_gets_no_request(
    router: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upstream, "TLS_CONNECT_TIMEOUT_S", DEADLINE_S)
    strange = tls_peer(tmp_path / "strange", GATEWAY_NAME, root_key=OTHER_ROOT_KEY)
    assert relay(router, strange, hold_s=0.0).status == 503
    assert "certificate verify failed" in caplog.text
    wrong = tls_peer(tmp_path / "gateway", GATEWAY_NAME, server=models_name("other"))
    assert relay(router, wrong, hold_s=0.0).status == 503
    assert "Hostname mismatch" in caplog.text


def test_a_client_without_tls_gets_no_answer(router: str) -> None:
    host, port = router.split(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
        answer = b""
        with suppress(ConnectionError):
            answer = plain.recv(1 << 16)
    assert b"HTTP" not in answer


def test_a_rotation_cuts_no_stream_and_loses_no_request(
    router: str, gateway: TlsPeer, folder: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = tls_options(gateway)
    with (
        httpx.Client(trust_env=False, timeout=DEADLINE_S, **options) as http,
        http.stream("GET", f"https://{router}/stream") as response,
    ):
        parts = response.iter_bytes()
        received = next(parts)
        for number in range(3):
            names = MODELS, f"{number}.faasmoe.internal"
            write_tls_folder(folder, *names)
            write_tls_folder(tmp_path / "gateway", GATEWAY_NAME, names[1])
            assert relay(router, gateway).status == 200
        received += b"".join(parts)
    assert received == b"".join(b"%d\n" % number for number in range(200))


def model(tls_name: str | None) -> ModelEntry:
    routers = (RouterEntry("a", "10.0.0.1:8000"),)
    return ModelEntry("llm/chat", "chat", 100, routers, tls_name=tls_name)


def route(entry: ModelEntry, tls: TlsFolder | None) -> ModelRoute:
    demand = DemandReporter(None)
    return ModelRoute(entry, front_token="", hold_timeout_s=1.0, demand=demand, tls=tls)


def test_the_file_names_the_certificate_of_each_models_routers(gateway: TlsPeer) -> None:
    taken = route(model(MODELS), gateway.folder).take(b"", 1)
    assert taken is not None
    assert taken.address.tls == TlsPeer(gateway.folder, MODELS)
    taken = route(model(None), gateway.folder).take(b"", 1)
    assert taken is not None
    assert taken.address.tls is None


def test_routers_with_certificates_need_a_gateway_that_has_one() -> None:
    with pytest.raises(ContractError, match=r"llm/chat.tls_name: got .* FAASMOE_TLS_FOLDER"):
        route(model(MODELS), None)


def test_the_file_without_certificates_is_as_it_was() -> None:
    """Gateways of an earlier version, which know no such field, read it."""
    file = GatewayFile((model(None),), ())
    assert b"tls_name" not in file.dumps()
    assert GatewayFile.loads(file.dumps()) == file
    named = GatewayFile((model(MODELS),), ())
    assert GatewayFile.loads(named.dumps()) == named
