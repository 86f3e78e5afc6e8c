"""Whatever a client sends, in whatever pieces, the front answers as HTTP or says nothing."""

from __future__ import annotations

import asyncio
import itertools
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn import Config
from uvicorn.server import ServerState

from faasmoe_gateway.connections import ConnectionLimits
from faasmoe_gateway.http_protocol import MAX_PIPELINED, BoundedHttpProtocol, bounded_protocol

PIECES = (
    *(b"GET / HTTP/1.1\r\n", b"POST /v1/completions HTTP/1.1\r\n", b"HEAD / HTTP/1.0\r\n"),
    *(b"Host: a\r\n", b"Host: b\r\n", b"Connection: close\r\n", b"Expect: 100-continue\r\n"),
    *(
        b"Content-Length: 3\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: 99999999999999999999\r\n",
    ),
    *(
        b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Upgrade: h2c\r\n",
    ),
    *(b"Authorization: Bearer \xff\r\n", b"X: " + b"a" * 70_000 + b"\r\n", b" folded\r\n"),
    *(b"\r\n", b"\n", b"\0", b"abc", b"3\r\nabc\r\n", b"0\r\n\r\n", b"ffffffffffffffff\r\n"),
)
STATUSES = {100, 200, 400, 413, 431, 503}


class FakeTransport(asyncio.Transport):
    """Collects what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_closed = False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_closed = True

    def is_closing(self) -> bool:
        return self.is_closed

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default

    def pause_reading(self) -> None:
        return None

    def resume_reading(self) -> None:
        return None


class App:
    """Reads bodies and answers; checks what it is given.

    Args:
        bodies: receives the bodies.
    """

    def __init__(self, bodies: list[bytes]) -> None:
        self._bodies = bodies

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        names = [name for name, _ in scope["headers"]]
        assert names.count(b"host") == 1 or scope["http_version"] == "1.0"
        codings = [value for name, value in scope["headers"] if name == b"transfer-encoding"]
        assert [c.lower() for c in codings] in ([], [b"chunked"])
        message: Any = {"more_body": True}
        body = b""
        while message.get("more_body"):
            message = await receive()
            body += message.get("body", b"")
        self._bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"an answer"})


async def serve(parts: list[bytes], bodies: list[bytes] | None = None) -> FakeTransport:
    """Return the transport of a connection that was sent some parts and then lost.

    Args:
        parts: what was sent.
        bodies: receives the bodies of the requests.
    """
    config = Config(
        App([] if bodies is None else bodies), ws="none", lifespan="off", log_level="critical"
    )
    config.load()
    failures: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
    create = bounded_protocol(ConnectionLimits())
    protocol = create(config=config, server_state=ServerState(), app_state={})
    assert isinstance(protocol, BoundedHttpProtocol)
    transport = FakeTransport()
    protocol.connection_made(transport)
    for part in parts:
        if not transport.is_closing():
            protocol.data_received(part)
        for _ in range(3):
            await asyncio.sleep(0)
    is_closed = transport.is_closed
    protocol.connection_lost(None)
    await asyncio.gather(*(t for t in asyncio.all_tasks() if t is not asyncio.current_task()))
    transport.is_closed = is_closed
    assert not failures
    return transport


def cut(content: bytes, places: list[float]) -> list[bytes]:
    """Cut bytes at some places, each a fraction of the length."""
    indices = sorted({0, len(content), *(int(place * len(content)) for place in places)})
    return [content[a:b] for a, b in itertools.pairwise(indices)]


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=40)), max_size=12),
    st.lists(st.floats(0, 1), max_size=6),
)
def test_anything_is_answered_or_refused(pieces: list[bytes], places: list[float]) -> None:
    transport = asyncio.run(serve(cut(b"".join(pieces), places)))
    statuses = [int(s) for s in re.findall(rb"HTTP/1\.1 (\d{3}) ", transport.written)]
    assert set(statuses) <= STATUSES
    assert bool(transport.written) == bool(statuses)
    if any(status in (400, 431, 503) for status in statuses):
        assert transport.is_closed
        assert statuses[-1] in (400, 431, 503)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=20))
def test_requests_are_read_however_they_are_cut(places: list[float]) -> None:
    head = b"POST / HTTP/1.1\r\nHost: a\r\n"
    whole = head + b"Content-Length: 3\r\n\r\nabc"
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n2;x=y\r\nbc\r\n0\r\n\r\n"
    transport = asyncio.run(serve(cut(whole + chunked + whole, places)))
    assert transport.written.count(b"HTTP/1.1 200 OK") == 3
    assert transport.written.count(b"an answer") == 3


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=6), st.sampled_from(["h2c", "websocket", "TLS/1.0"]))
def test_request_that_offers_an_upgrade_is_answered_with_its_body(
    places: list[float], protocol: str
) -> None:
    offer = (
        f"Upgrade: {protocol}\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk"
    )
    head = b"POST / HTTP/1.1\r\nHost: a\r\n"
    offering = head + offer.encode() + b"\r\nContent-Length: 3\r\n\r\nabc"
    bodies: list[bytes] = []
    parts = cut(offering * 2 + head + b"Content-Length: 3\r\n\r\ndef", places)
    transport = asyncio.run(serve(parts, bodies))
    assert transport.written.count(b"HTTP/1.1 200 OK") == 3
    assert bodies == [b"abc", b"abc", b"def"]


def test_connection_with_too_many_requests_at_once_ends_after_the_first_answers() -> None:
    request = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    for n_requests, n_answers in ((MAX_PIPELINED, MAX_PIPELINED), (20_000, MAX_PIPELINED + 1)):
        bodies: list[bytes] = []
        transport = asyncio.run(serve([request * n_requests, *[b""] * n_answers], bodies))
        assert transport.written.count(b"HTTP/1.1 200 OK") == len(bodies) == n_answers
        assert transport.is_closed == (n_requests > n_answers)


class PatientApp:
    """Answers nothing until the client has left; counts requests that began and that were left."""

    def __init__(self) -> None:
        self.n_begun = self.n_left = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.n_begun += 1
        while (await receive())["type"] != "http.disconnect":
            pass
        self.n_left += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})


def test_client_that_leaves_its_pipelined_requests_is_noticed_by_the_first() -> None:
    app = PatientApp()

    async def leave() -> None:
        config = Config(app, ws="none", lifespan="off", log_level="critical")
        config.load()
        create = bounded_protocol(ConnectionLimits())
        protocol = create(config=config, server_state=ServerState(), app_state={})
        protocol.connection_made(FakeTransport())
        protocol.data_received(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 3)
        await asyncio.sleep(0)
        protocol.connection_lost(None)
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        await asyncio.wait_for(asyncio.gather(*tasks), 20)

    asyncio.run(leave())
    assert (app.n_begun, app.n_left) == (1, 1)


async def refuse(scope: Any, receive: Any, send: Any) -> None:
    """Answer without reading the body."""
    await send({"type": "http.response.start", "status": 401, "headers": []})
    await send({"type": "http.response.body", "body": b"no"})


@pytest.mark.parametrize("is_sent", [True, False])
def test_refused_client_that_still_sends_its_body_can_read_the_answer(is_sent: bool) -> None:
    head = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 4\r\n\r\n"

    async def send(*parts: bytes) -> FakeTransport:
        config = Config(refuse, ws="none", lifespan="off", log_level="critical")
        config.load()
        create = bounded_protocol(ConnectionLimits())
        protocol = create(config=config, server_state=ServerState(), app_state={})
        transport = FakeTransport()
        protocol.connection_made(transport)
        for part in parts:
            assert not transport.is_closed
            protocol.data_received(part)
            for _ in range(3):
                await asyncio.sleep(0)
        is_closed = transport.is_closed
        protocol.connection_lost(None)
        transport.is_closed = is_closed
        return transport

    transport = asyncio.run(send(head, b"bo", b"dy") if is_sent else send(head, b"bo"))
    assert transport.written.startswith(b"HTTP/1.1 401")
    assert transport.is_closed == is_sent
