"""A sandbox limits open connections and closes idle ones."""

import select
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from raw_http import (
    DEADLINE_S,
    TOKEN,
    n_connections,
    read_all,
    read_response,
    request_frame,
    wait_until,
)
from sandbox_processes import SandboxProcess, StartSandbox

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Store

HEALTH = b"GET /healthz HTTP/1.1\r\nhost: test\r\n\r\n"
MAX_CONNECTIONS = 4
IDLE_TIMEOUT_S = 3.0


def connect(sandbox_server: SandboxProcess) -> socket.socket:
    host, port = sandbox_server.address.split(":")
    return socket.create_connection((host, int(port)), timeout=DEADLINE_S)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_rejects_connections_above_the_limit(sandbox: StartSandbox, stack: ExitStack) -> None:
    sandbox_server = stack.enter_context(sandbox(max_connections=MAX_CONNECTIONS))
    sandbox_server.http.close()
    wait_until(lambda: n_connections(sandbox_server) == 0)
    clients = [stack.enter_context(connect(sandbox_server)) for _ in range(MAX_CONNECTIONS)]
    for client in clients:
        client.sendall(HEALTH)
        assert read_response(client)[0] == 200
    for _ in range(3 * MAX_CONNECTIONS):
        with connect(sandbox_server) as rejected:
            status, headers, body = read_response(rejected)
            assert (status, headers["connection"]) == (503, "close")
            assert b'"code": "too_many_connections"' in body
            assert read_all(rejected) == b""
    clients[0].close()
    wait_until(lambda: n_connections(sandbox_server) == MAX_CONNECTIONS - 1)
    with connect(sandbox_server) as client:
        client.sendall(HEALTH)
        assert read_response(client)[0] == 200


def test_connections_without_the_token_give_way(sandbox: StartSandbox, stack: ExitStack) -> None:
    sandbox_server = stack.enter_context(sandbox(max_connections=MAX_CONNECTIONS, token=TOKEN))
    sandbox_server.http.close()
    wait_until(lambda: n_connections(sandbox_server) == 0)
    peer = stack.enter_context(connect(sandbox_server))
    status_request = HEALTH.replace(
        b"\r\n\r\n", f"\r\nauthorization: Bearer {TOKEN}\r\n\r\n".encode()
    )
    peer.sendall(status_request)
    assert read_response(peer)[0] == 200
    idle = [stack.enter_context(connect(sandbox_server)) for _ in range(5 * MAX_CONNECTIONS)]
    with connect(sandbox_server) as probe:
        probe.sendall(HEALTH)
        assert read_response(probe)[0] == 200
    peer.sendall(status_request)
    assert read_response(peer)[0] == 200
    assert len(idle) > MAX_CONNECTIONS >= n_connections(sandbox_server)


def test_nothing_is_reserved_for_a_body_without_the_token(
    sandbox: StartSandbox, store: Store, spec: FunctionSpec, stack: ExitStack
) -> None:
    settings = {"token": TOKEN, "capacity": 4, "max_frames": 1}
    sandbox_server = stack.enter_context(sandbox(**settings))
    sandbox_server.attach(store, spec)
    head = f"POST /v1/functions/{spec.id} HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000\r\n\r\n"
    strangers = [stack.enter_context(connect(sandbox_server)) for _ in range(3)]
    for stranger in strangers:
        stranger.sendall(head.encode() + b"x")
        assert read_response(stranger)[0] == 401
    url = f"/v1/functions/{spec.id}"
    assert sandbox_server.http.post(url, content=request_frame()).status_code == 200


def test_closes_idle_connections(sandbox: StartSandbox, stack: ExitStack) -> None:
    sandbox_server = stack.enter_context(sandbox(idle_timeout_s=IDLE_TIMEOUT_S))
    silent, used = (stack.enter_context(connect(sandbox_server)) for _ in range(2))
    used.sendall(HEALTH)
    assert read_response(used)[0] == 200
    assert read_all(silent) == b""
    assert read_all(used) == b""


def test_keeps_connections_in_use_open(sandbox: StartSandbox, stack: ExitStack) -> None:
    sandbox_server = stack.enter_context(sandbox(idle_timeout_s=IDLE_TIMEOUT_S))
    used = stack.enter_context(connect(sandbox_server))
    for _ in range(12):  # for twice the idle timeout
        used.sendall(HEALTH)
        assert read_response(used)[0] == 200
        is_readable = select.select([used], [], [], IDLE_TIMEOUT_S / 6)[0]
        assert not is_readable, "neither data nor a close"


def test_incomplete_request_is_not_idle(sandbox: StartSandbox, stack: ExitStack) -> None:
    sandbox_server = stack.enter_context(sandbox(idle_timeout_s=1.0, request_timeout_s=3.0))
    slow = stack.enter_context(connect(sandbox_server))
    slow.sendall(HEALTH[:10])
    status, _, _ = read_response(slow)
    assert status == 408
