"""The client against faulty servers; for well-behaved ones see platforms/test_process.py."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_operator.control.sandbox_client import (
    ModelStore,
    SandboxClient,
    SandboxClientError,
    SandboxClientTimeouts,
)

STORE = ModelStore(Path("/store"), "sha256:0")
FUNCTION = FunctionSpec("f1", (0,), (0, 1))
OTHER = FunctionSpec("f2", (1,), (0, 1))
Call = Callable[[SandboxClient, str], Awaitable[object]]


async def attach(client: SandboxClient, address: str) -> None:
    await client.attach(address, FUNCTION, store=STORE)


async def attach_all(client: SandboxClient, address: str) -> object:
    return await client.attach_all(address, [FUNCTION, OTHER], store=STORE)


async def detach(client: SandboxClient, address: str) -> None:
    await client.detach(address, FUNCTION.id)


async def detach_all(client: SandboxClient, address: str) -> None:
    await client.detach_all(address, Path("/stores/a b"))


async def list_store(client: SandboxClient, address: str) -> object:
    return await client.list(address, store=Path("/stores/a b"))


async def list_functions(client: SandboxClient, address: str) -> object:
    return await client.list(address)


def http_response(status: int, body: object) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(content), content)


def call_with(call: Call, reply: bytes | None, requests: list[bytes] | None = None) -> object:
    """Run a call against a server that sends this reply, or never responds if it is None."""
    served: list[asyncio.Task[None] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(asyncio.current_task())
        request = await reader.readuntil(b"\r\n\r\n")
        if requests is not None:
            requests.append(request)
        writer.write(reply or b"")
        await (reader.read() if reply is None else writer.drain())
        writer.close()
        await writer.wait_closed()

    async def run() -> object:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        timeout_s = 0.3 if reply is None else 120.0
        timeouts = SandboxClientTimeouts(
            attach_timeout_s=timeout_s, list_timeout_s=timeout_s, detach_timeout_s=timeout_s
        )
        async with server:
            try:
                async with SandboxClient(token="secret", timeouts=timeouts) as client:
                    return await call(client, f"{host}:{port}")
            finally:
                await asyncio.gather(*filter(None, served))

    return asyncio.run(run())


def test_sends_the_bearer_token() -> None:
    requests: list[bytes] = []
    call_with(attach, http_response(201, {}), requests)
    assert requests[0].startswith(b"PUT /v1/functions/f1 HTTP/1.1")
    assert b"Authorization: Bearer secret" in requests[0]


def test_attaches_several_functions_and_returns_the_errors_of_those_that_were_refused() -> None:
    requests: list[bytes] = []
    error = {"code": "corrupted", "message": "store: no", "field": "store"}
    reply = http_response(200, {"functions": [{"id": "f1"}, {"id": "f2", "error": error}]})
    refused = call_with(attach_all, reply, requests)
    assert requests[0].startswith(b"PUT /v1/functions HTTP/1.1")
    assert isinstance(refused, dict)
    assert {n: (e.code, e.field, str(e).endswith("store: no")) for n, e in refused.items()} == {
        "f2": ("corrupted", "store", True)
    }


def test_detach_of_an_unknown_function_succeeds() -> None:
    error = {"error": {"code": "unknown_function", "message": "id: got 'f1'"}}
    call_with(detach, http_response(404, error))
    call_with(detach, b"HTTP/1.1 204 X\r\n\r\n")


def test_lists_and_detaches_the_functions_of_a_store_alone() -> None:
    requests: list[bytes] = []
    call_with(list_store, http_response(200, {"functions": []}), requests)
    call_with(detach_all, http_response(200, {"detached": []}), requests)
    assert requests[0].startswith(b"GET /v1/functions?store=%2Fstores%2Fa+b HTTP/1.1")
    assert requests[1].startswith(b"DELETE /v1/functions HTTP/1.1")


@pytest.mark.parametrize(
    ("call", "reply", "code", "message"),
    [
        pytest.param(attach, None, "timeout", "no response within 0.3 s", id="silent"),
        pytest.param(attach, b"\x00\x01garbage", "unreachable", "PUT /f1", id="no-http"),
        pytest.param(
            attach, http_response(200, b"<html>"), "protocol_error", "without JSON", id="no-json"
        ),
        pytest.param(attach, http_response(200, [1]), "protocol_error", "got list", id="no-object"),
        pytest.param(
            attach,
            http_response(500, {}),
            "protocol_error",
            "without an error",
            id="no-error-object",
        ),
        pytest.param(
            attach,
            http_response(
                409, {"error": {"code": "full", "message": "capacity: got 2", "field": "x"}}
            ),
            "full",
            "capacity: got 2",
            id="refused",
        ),
        pytest.param(
            attach_all, http_response(200, {}), "protocol_error", "functions", id="no-results"
        ),
        pytest.param(
            attach_all,
            http_response(200, {"functions": [{"id": "f1"}]}),
            "protocol_error",
            "functions: expected each",
            id="one-result-of-two",
        ),
        pytest.param(
            attach_all,
            http_response(200, {"functions": ["f1", "f2"]}),
            "protocol_error",
            "functions: expected each",
            id="results-no-objects",
        ),
        pytest.param(
            attach_all,
            http_response(200, {"functions": [{"id": ["f1"]}, {"id": "f2"}]}),
            "protocol_error",
            "functions: expected each",
            id="id-is-a-list",
        ),
        pytest.param(
            list_functions, http_response(200, {}), "protocol_error", "functions", id="no-functions"
        ),
        pytest.param(
            list_functions,
            http_response(200, {"functions": [{"id": "f1", "layers": [], "experts": [0]}]}),
            "protocol_error",
            "layers: got an empty list",
            id="function-without-layers",
        ),
    ],
)
def test_raises_errors_with_their_code(
    call: Call, reply: bytes | None, code: str, message: str
) -> None:
    with pytest.raises(SandboxClientError, match=message) as caught:
        call_with(call, reply)
    assert caught.value.code == code
    assert str(caught.value).startswith("sandbox 127.0.0.1:")


def test_raises_when_the_sandbox_is_unreachable() -> None:
    async def run() -> None:
        async with SandboxClient(token="") as client:
            await client.list("127.0.0.1:1")

    with pytest.raises(SandboxClientError) as caught:
        asyncio.run(run())
    assert caught.value.code == "unreachable"
