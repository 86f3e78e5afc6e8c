"""Limits on clients before anything of their requests reaches the app."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from server_thread import running_server

from faasmoe_gateway.connections import ConnectionLimits
from faasmoe_gateway.http_protocol import PREPARED_EXTENSION
from faasmoe_gateway.server import Server

DEADLINE_S = 120.0
HEAD = b"POST / HTTP/1.1\r\nHost: a\r\n"
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


class EchoApp:
    """Answers a POST with its body's size, once `release` is set; knows who sends `X-Key`."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.release.set()
        self.started = threading.Semaphore(0)
        self.disconnected = threading.Semaphore(0)
        self.answer_bytes = 0  # of a large answer instead

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for phase in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{phase}.complete"})
            return
        if b"x-key" in dict(scope["headers"]):
            scope["extensions"]["faasmoe.known_client"]()
        if b"x-prepared" in dict(scope["headers"]):
            scope["extensions"][PREPARED_EXTENSION]()
        size_bytes, message = 0, {"more_body": True}
        while message.get("more_body"):
            message = await receive()
            size_bytes += len(message.get("body", b""))
        self.started.release()
        leaving = asyncio.create_task(receive())
        released = asyncio.create_task(asyncio.to_thread(self.release.wait, DEADLINE_S))
        await asyncio.wait({leaving, released}, return_when=asyncio.FIRST_COMPLETED)
        if leaving.done():
            self.disconnected.release()
        if self.answer_bytes:
            await self._send_large(send)
            await leaving
            self.disconnected.release()
            return
        body = str(size_bytes).encode()
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if b"x-prepared" in dict(scope["headers"]):
            scope["extensions"][PREPARED_EXTENSION]()  # too late, and ignored
        await send({"type": "http.response.body", "body": body})
        scope["extensions"][PREPARED_EXTENSION]()
        leaving.cancel()

    async def _send_large(self, send: Any) -> None:
        headers = [(b"content-length", str(self.answer_bytes).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        part = {"type": "http.response.body", "body": bytes(1 << 20), "more_body": True}
        for _ in range(self.answer_bytes >> 20):
            await send(part)


Connect = Callable[[], socket.socket]


@contextmanager
def serving(**limits: Any) -> Iterator[tuple[EchoApp, Connect]]:
    app, connections = EchoApp(), list[socket.socket]()
    server = Server(
        app,
        on_drain_timeout=lambda: None,
        drain_timeout_s=0,
        connection_limits=ConnectionLimits(**limits),
    )
    with running_server(server) as url:
        host, port = url.removeprefix("http://").split(":")

        def connect() -> socket.socket:
            connections.append(socket.create_connection((host, int(port)), timeout=DEADLINE_S))
            return connections[-1]

        try:
            yield app, connect
        finally:
            app.release.set()
            for connection in connections:
                connection.close()


def read_all(connection: socket.socket) -> bytes:
    parts = []
    with suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def error_of(response: bytes) -> tuple[int, str]:
    head, _, body = response.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["code"]


def send_all(connection: socket.socket, content: bytes) -> None:
    with suppress(BrokenPipeError, ConnectionResetError):  # refused before the end
        connection.sendall(content)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(
            HEAD + b"X: " + b"a" * 1_000_000, (431, "request_headers_too_large"), id="one-header"
        ),
        pytest.param(
            HEAD + b"X: a\r\n" * 200_000, (431, "request_headers_too_large"), id="many-headers"
        ),
        pytest.param(
            b"GET /" + b"a" * 1_000_000, (431, "request_headers_too_large"), id="long-path"
        ),
        pytest.param(
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: " + b"a" * 1_000_000,
            (431, "request_headers_too_large"),
            id="trailer",
        ),
        pytest.param(
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: a\r\n" * 200_000,
            (431, "request_headers_too_large"),
            id="trailers",
        ),
        pytest.param(
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"a" * 1_000_000,
            (431, "request_headers_too_large"),
            id="chunk-extension",
        ),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", (400, "invalid_request"), id="no-host"),
        pytest.param(
            b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", (400, "invalid_request"), id="hosts"
        ),
        pytest.param(
            HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            (400, "invalid_request"),
            id="codings",
        ),
        pytest.param(
            HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            (400, "invalid_request"),
            id="codings-twice",
        ),
        pytest.param(b"\x16\x03\x01\x02\x00", (400, "invalid_request"), id="not-http"),
    ],
)
def test_a_bad_head_is_refused(content: bytes, expected: tuple[int, str]) -> None:
    with serving() as (_, connect):
        connection = connect()
        send_all(connection, content)
        response = read_all(connection)
        assert error_of(response) == expected
        connection = connect()
        connection.sendall(GET)
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


def test_a_chunked_body_of_single_bytes_is_read() -> None:
    with serving() as (_, connect):
        connection = connect()
        connection.sendall(
            HEAD
            + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
            + b"1\r\nx\r\n" * 50_000
            + b"0\r\n\r\n"
        )
        assert read_all(connection).endswith(b"50000")


@pytest.mark.parametrize(
    ("content", "status"),
    [
        pytest.param(b"", b"", id="nothing"),
        pytest.param(HEAD, b"HTTP/1.1 408", id="head"),
        pytest.param(HEAD + b"Content-Length: 9\r\n\r\nab", b"HTTP/1.1 408", id="body"),
        pytest.param(b"\r\n", b"", id="line-end"),
    ],
)
def test_a_request_that_does_not_arrive_is_ended(content: bytes, status: bytes) -> None:
    with serving(head_timeout_s=0.2, body_timeout_s=0.2) as (_, connect):
        connection = connect()
        connection.sendall(content)
        response = read_all(connection)
        assert response.startswith(status)
        assert bool(response) == bool(status)


def test_an_idle_connection_is_kept_as_long_as_configured() -> None:
    for keep_alive_s, n_requests in ((DEADLINE_S, 2), (0.3, 1)):
        with serving(keep_alive_s=keep_alive_s, head_timeout_s=keep_alive_s) as (_, connect):
            connection = connect()
            for _ in range(n_requests):
                connection.sendall(GET)
                assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            if n_requests == 1:
                send_all(connection, b"\r\n")  # begins no request, and buys little time
                assert read_all(connection) == b""


def test_a_client_that_reads_nothing_of_its_answer_is_ended() -> None:
    with serving(write_timeout_s=0.2) as (app, connect):
        app.answer_bytes = 64 << 20  # more than sockets hold
        connection = connect()
        connection.sendall(GET)
        assert app.disconnected.acquire(timeout=DEADLINE_S)
        assert len(read_all(connection)) < app.answer_bytes


def test_a_half_closed_client_gets_its_answer() -> None:
    with serving() as (app, connect):
        app.release.clear()
        connection = connect()
        connection.sendall(GET)
        connection.shutdown(socket.SHUT_WR)
        assert app.started.acquire(timeout=DEADLINE_S)
        assert connection.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert not app.disconnected.acquire(timeout=0.2)  # the probe is over
        app.release.set()
        assert read_all(connection).startswith(b"HTTP/1.1 200")


def test_a_client_that_has_left_is_noticed() -> None:
    with serving() as (app, connect):
        app.release.clear()
        connection = connect()
        connection.sendall(GET)
        assert app.started.acquire(timeout=DEADLINE_S)
        connection.close()
        assert app.disconnected.acquire(timeout=DEADLINE_S)


def test_unknown_connections_are_closed_for_new_ones() -> None:
    with serving(max_connections=4) as (_, connect):
        paying = connect()
        paying.sendall(GET.replace(b"Host", b"X-Key: k\r\nHost"))
        assert paying.recv(1000).startswith(b"HTTP/1.1 200")
        for _ in range(20):
            connect()
        probe = connect()
        probe.sendall(GET)
        assert probe.recv(1000).startswith(b"HTTP/1.1 200")
        paying.sendall(GET)
        assert paying.recv(1000).startswith(b"HTTP/1.1 200")


def test_more_connections_than_can_be_served_are_refused() -> None:
    with serving(max_per_address=2) as (app, connect):
        app.release.clear()
        for _ in range(2):
            connect().sendall(GET)
            assert app.started.acquire(timeout=DEADLINE_S)
        response = read_all(connect())
        assert error_of(response) == (503, "too_many_connections")
        assert b"retry-after" in response


def test_a_refused_pipelined_request_leaves_the_answer_before_it_whole() -> None:
    with serving() as (app, connect):
        app.release.clear()
        connection = connect()
        connection.sendall(GET)
        assert app.started.acquire(timeout=DEADLINE_S)
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        app.release.set()
        response = read_all(connection)
        assert response.startswith(b"HTTP/1.1 200")
        assert response.endswith(b"\r\n\r\n0")


def test_an_app_tells_its_front_once_before_the_answer_that_a_request_is_prepared() -> None:
    requests = [HEAD + b"X-Prepared: 1\r\nContent-Length: 2\r\n\r\nab", HEAD + b"Connection: close"]
    with serving() as (_, connect):
        connection = connect()
        connection.sendall(b"".join(requests) + b"\r\nContent-Length: 0\r\n\r\n")  # pipelined
        received = read_all(connection)
    interim, first, second = received.split(b"HTTP/1.1 ")[1:]
    assert interim == b"102 Processing\r\n\r\n"
    assert [answer[:4] for answer in (first, second)] == [b"200 "] * 2
    assert [answer.rpartition(b"\r\n")[2] for answer in (first, second)] == [b"2", b"0"]
