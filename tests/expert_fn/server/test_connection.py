"""Raw HTTP: malformed, slow and lost connections are closed and never stop the sandbox."""

import contextlib
import re
import select
import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from raw_http import (
    DEADLINE_S,
    HIDDEN,
    TIMEOUT_S,
    TOKEN,
    n_connections,
    post_request,
    read_all,
    read_response,
    request_frame,
    wait_until,
)
from sandbox_processes import SandboxProcess

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.wire import MAX_FRAME_BYTES, OutputMode

Connect = Callable[[], socket.socket]
HEALTH = b"GET /healthz HTTP/1.1\r\nhost: test\r\n\r\n"


def parse_statuses(received: bytes) -> list[int]:
    """Return the statuses of all responses in `received`."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00", id="TLS"),
        pytest.param(b"FMOE" + bytes(100), id="a frame without HTTP"),
        pytest.param(b"GET\r\n\r\n", id="no target"),
        pytest.param(b"GET /healthz HTTP/9.9\r\n\r\n", id="version to come"),
        pytest.param(b"BREW /healthz HTTP/1.1\r\n\r\n", id="unknown method"),
        pytest.param(b"GET /healthz HTTP/1.1\r\nno colon\r\n\r\n", id="header without a colon"),
        pytest.param(b"GET /healthz HTTP/1.1\r\na: b\0\r\n\r\n", id="zero byte in a header"),
        pytest.param(b"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n", id="length no number"),
        pytest.param(b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n", id="length negative"),
        pytest.param(b"POST / HTTP/1.1\r\ncontent-length: 1e3\r\n\r\n", id="length with exponent"),
        pytest.param(
            b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n", id="two lengths"
        ),
        pytest.param(
            b"POST / HTTP/1.1\r\ncontent-length: " + b"9" * 5000 + b"\r\n\r\n", id="length of 5000"
        ),
        pytest.param(
            b"POST / HTTP/1.1\r\ncontent-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            id="length and chunks",
        ),
        pytest.param(
            b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
            id="chunk size no number",
        ),
        pytest.param(
            b"POST / HTTP/1.1\r\nauthorization: Bearer a-token\r\n"
            b"transfer-encoding: chunked\r\n\r\n"
            b"1\r\nabc\r\n",
            id="chunk too long",
        ),
        pytest.param(b"CONNECT test:80 HTTP/1.1\r\nhost: test\r\n\r\n", id="tunnel"),
        pytest.param(
            b"GET /healthz HTTP/1.1\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n", id="upgrade"
        ),
    ],
)
def test_invalid_http_gets_one_400_and_is_closed(connect: Connect, request_bytes: bytes) -> None:
    client = connect()
    client.sendall(request_bytes)
    status, headers, body = read_response(client)
    assert status in (400, 413)
    assert headers["connection"] == "close"
    assert b'"message": "' in body
    assert read_all(client) == b""


def test_ignores_requests_after_an_error(connect: Connect) -> None:
    client = connect()
    client.sendall(HEALTH + b"nonsense\r\n\r\n" + HEALTH)
    assert parse_statuses(read_all(client)) == [200, 400]


def test_ignores_requests_after_connection_close(connect: Connect) -> None:
    client = connect()
    client.sendall(HEALTH.replace(b"host: test", b"connection: close") + HEALTH)
    assert parse_statuses(read_all(client)) == [200]


def test_closes_http_1_0_connections_after_the_response(connect: Connect) -> None:
    client = connect()
    client.sendall(b"GET /healthz HTTP/1.0\r\n\r\n")
    assert parse_statuses(read_all(client)) == [200]


def test_head_response_has_no_body(connect: Connect) -> None:
    client = connect()
    last = HEALTH.replace(b"host: test", b"connection: close")
    client.sendall(b"HEAD /healthz HTTP/1.1\r\nhost: test\r\n\r\n" + last)
    head, second, body = read_all(client).split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    assert b"content-length: 16\r\n" in head + b"\r\n"
    assert second.startswith(b"HTTP/1.1 200")
    assert body == b'{"status": "ok"}'


def test_pipelined_requests_are_answered_in_order(connect: Connect, spec: FunctionSpec) -> None:
    client = connect()
    client.sendall(b"".join(post_request(spec.id, request_frame(n_rows=n)) for n in range(1, 40)))
    for n in range(1, 40):
        status, _, body = read_pipelined_response(client)
        assert status == 200
        assert len(body) == 32 + n * HIDDEN * 4


def read_pipelined_response(client: socket.socket) -> tuple[int, bytes, bytes]:
    """Read the next of several responses without reading ahead."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += client.recv(1)
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return int(head[9:12]), head, client.recv(length, socket.MSG_WAITALL)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_accepts_a_request_in_small_pieces(connect: Connect, spec: FunctionSpec, size: int) -> None:
    client = connect()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    request = post_request(spec.id, request_frame())
    for start in range(0, len(request), size):
        client.sendall(request[start : start + size])
    assert read_response(client)[0] == 200


def test_accepts_a_chunked_body(connect: Connect, spec: FunctionSpec) -> None:
    client = connect()
    content = request_frame()
    head = (
        f"POST /v1/functions/{spec.id} HTTP/1.1\r\nauthorization: Bearer {TOKEN}\r\n"
        "transfer-encoding: chunked\r\n\r\n"
    )
    chunks = [content[i : i + 50] for i in range(0, len(content), 50)]
    body = b"".join(b"%x;note=1\r\n%s\r\n" % (len(c), c) for c in chunks)
    client.sendall(head.encode() + body + b"0\r\ntrailer: 1\r\n\r\n")
    assert read_response(client)[0] == 200


def test_computes_a_frame_of_maximum_size(
    sandbox_server: SandboxProcess, spec: FunctionSpec
) -> None:
    n_rows = (MAX_FRAME_BYTES - 32) // (HIDDEN * 4 + 12)
    frame = request_frame(n_rows=n_rows)
    response = sandbox_server.http.post(f"/v1/functions/{spec.id}", content=frame)
    assert len(frame) <= MAX_FRAME_BYTES < len(frame) + HIDDEN * 4 + 12
    assert response.status_code == 200
    assert len(response.content) == 32 + n_rows * HIDDEN * 4


def test_rejects_an_oversized_body_when_announced(connect: Connect, spec: FunctionSpec) -> None:
    client = connect()
    head, _, _ = post_request(spec.id, b"").partition(b"content-length")
    client.sendall(head + b"content-length: %d\r\n\r\n" % (MAX_FRAME_BYTES + 1))
    status, headers, body = read_response(client)
    assert (status, headers["connection"]) == (413, "close")
    assert f"body: got {MAX_FRAME_BYTES + 1} bytes, expected at most {MAX_FRAME_BYTES}" in str(body)


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 1 << 10])
def test_rejects_an_oversized_chunked_body(
    connect: Connect, spec: FunctionSpec, chunk_bytes: int
) -> None:
    client = connect()
    head, _, _ = post_request(spec.id, b"").partition(b"content-length")
    client.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
    chunk = b"%x\r\n%s\r\n" % (chunk_bytes, bytes(chunk_bytes))
    send_until_answered(client, chunk)
    assert read_response(client)[0] == 413


@pytest.mark.parametrize(
    ("start", "endless"),
    [
        pytest.param(b"GET /", b"x" * 4096, id="target"),
        pytest.param(b"GET / HTTP/1.1\r\n", b"name: " + b"x" * 100 + b"\r\n", id="many headers"),
        pytest.param(b"GET / HTTP/1.1\r\nname: ", b"x" * 65536, id="one value"),
        pytest.param(b"GET / HTTP/1.1\r\n", b"x" * 65536, id="one name"),
    ],
)
def test_rejects_an_oversized_head(connect: Connect, start: bytes, endless: bytes) -> None:
    client = connect()
    client.sendall(start)
    send_until_answered(client, endless)
    assert read_response(client)[0] == 431


def test_rejects_endless_trailers(connect: Connect) -> None:
    client = connect()
    client.sendall(b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\nname: ")
    send_until_answered(client, b"x" * 65536)
    assert read_response(client)[0] == 431


def send_until_answered(client: socket.socket, piece: bytes) -> None:
    """Send `piece` repeatedly until a response arrives, even if the sandbox stops reading."""
    client.setblocking(False)
    view = memoryview(piece)
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while not select.select([client], [client], [], DEADLINE_S)[0]:
            view = view[client.send(view) :] or memoryview(piece)
    client.settimeout(DEADLINE_S)


@pytest.mark.parametrize(
    "part",
    [
        b"G",
        HEALTH[:-2],
        b"POST /healthz HTTP/1.1\r\nauthorization: Bearer a-token\r\ncontent-length: 9\r\n\r\nabc",
    ],
)
def test_incomplete_request_times_out_with_408(connect: Connect, part: bytes) -> None:
    client = connect()
    client.sendall(part)
    status, _, body = read_response(client)
    assert status == 408
    assert f"request: got an incomplete request after {TIMEOUT_S:g} s" in str(body)
    assert read_all(client) == b""


def test_incomplete_pipelined_request_times_out(connect: Connect) -> None:
    client = connect()
    client.sendall(HEALTH + HEALTH[:10])
    assert parse_statuses(read_all(client)) == [200, 408]


def test_slow_bytes_do_not_extend_the_timeout(connect: Connect) -> None:
    client = connect()
    client.settimeout(0.05)
    received = b""
    client.sendall(HEALTH[:-2] + b"name: ")
    for _ in range(int(20 * TIMEOUT_S / 0.05)):
        try:
            client.sendall(b"x")
            received += client.recv(1 << 16)
        except TimeoutError:
            continue
        except OSError:
            break
        if received:
            break
    assert parse_statuses(received) == [408]


def test_idle_connection_stays_open_beyond_the_request_timeout(
    connect: Connect, sandbox_server: SandboxProcess
) -> None:
    client, other = connect(), connect()
    client.sendall(HEALTH)
    assert read_response(client)[0] == 200
    other.sendall(b"G")  # times out after the request timeout
    assert read_response(other)[0] == 408
    client.sendall(HEALTH)
    assert read_response(client)[0] == 200


def test_half_closed_client_gets_its_response(connect: Connect, spec: FunctionSpec) -> None:
    client = connect()
    client.sendall(post_request(spec.id, request_frame()))
    client.shutdown(socket.SHUT_WR)
    assert parse_statuses(read_all(client)) == [200]


@pytest.mark.parametrize("part_bytes", [0, 1, 60, 150, 10_000])
def test_releases_connections_that_are_reset(
    connect: Connect, sandbox_server: SandboxProcess, spec: FunctionSpec, part_bytes: int
) -> None:
    before = n_connections(sandbox_server)
    for _ in range(10):
        client = connect()
        client.sendall(post_request(spec.id, request_frame())[:part_bytes])
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset
        client.close()
    wait_until(lambda: n_connections(sandbox_server) <= before)


def test_aborts_a_client_that_does_not_read_responses(
    connect: Connect, sandbox_server: SandboxProcess, spec: FunctionSpec
) -> None:
    before = n_connections(sandbox_server)
    client = connect()
    client.setblocking(False)
    frame = post_request(
        spec.id, request_frame(n_rows=1, mode=OutputMode.UNREDUCED, **many_pairs(60_000))
    )
    with contextlib.suppress(BlockingIOError):
        while True:
            client.sendall(frame)
    wait_until(lambda: n_connections(sandbox_server) <= before)


def many_pairs(n_pairs: int) -> dict[str, Any]:
    return {
        "pair_row": np.zeros(n_pairs, dtype=np.int32),
        "pair_expert": np.ones(n_pairs, dtype=np.int32),
        "pair_weight": np.ones(n_pairs, dtype=np.float32),
    }


def test_serves_200_clients_concurrently(connect: Connect, spec: FunctionSpec) -> None:
    clients = [connect() for _ in range(200)]
    for _ in range(2):
        for client in clients:
            client.sendall(post_request(spec.id, request_frame()))
        assert {read_response(client)[0] for client in clients} == {200}
