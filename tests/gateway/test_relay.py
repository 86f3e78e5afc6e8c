"""The gateway's relay in front of routers that die."""

from __future__ import annotations

import asyncio
import json
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop
from tests.gateway.fake_router import FakeRouter, die, reply, stream

from faasmoe_contracts.stream_records import COMMENT, EVENT, pack_record
from faasmoe_gateway import held_request, relay, router_losses
from faasmoe_gateway.app import GatewayApp
from faasmoe_gateway.held_request import HoldBudget
from faasmoe_gateway.relay import RouterAddress
from faasmoe_gateway.router_losses import MAX_FRUITLESS_DEATHS
from faasmoe_gateway.sender_turns import SenderTurns
from faasmoe_gateway.upstream import RouterConnection, RouterLost

BODY = b'{"model":"m"}'
FIRST = pack_record(EVENT, b"origin\n", b"data: 1\n\n")
SECOND = pack_record(EVENT, b"entry\n", b"data: 2\n\n")
THIRD = pack_record(EVENT, b"more\n", b"data: 3\n\n")
WAITING = pack_record(COMMENT, b"", b": waiting\n\n")


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:  # tmp_path may be too long
        yield Path(folder) / "router.sock"


class Client:
    """An ASGI client with one request.

    Attributes:
        messages: what it was sent.
        has_body: whether that includes a part of a body.
    """

    def __init__(self, *, body: bytes = BODY, method: str = "POST", **headers: str) -> None:
        self.messages: list[dict[str, Any]] = []
        self._incoming = [{"type": "http.request", "body": body, "more_body": False}]
        self._gone = asyncio.Event()
        self.has_body = asyncio.Event()
        fields = {"host": "a", "content-length": str(len(body)), **headers}
        self.scope = {
            "type": "http",
            "method": method,
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "headers": [(n.replace("_", "-").encode(), v.encode()) for n, v in fields.items()],
        }

    async def receive(self) -> dict[str, Any]:
        if self._incoming:
            return self._incoming.pop(0)
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.messages.append(dict(message))
        if message.get("body"):
            self.has_body.set()

    def hang_up(self) -> None:
        self._gone.set()

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)


def run(
    work: Callable[[], Awaitable[None]],
    new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(120):
            await work()

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(bounded())


def app(path: Path, *, hold_s: float = 5.0, budget: HoldBudget | None = None) -> GatewayApp:
    return GatewayApp(RouterAddress(str(path), "secret", hold_s), budget)


def test_stream_goes_on_after_what_the_client_has(path: Path) -> None:
    async def work() -> None:
        client, budget = Client(), HoldBudget()
        answers = stream(FIRST, WAITING, SECOND, is_whole=False), stream(THIRD)
        async with FakeRouter(path, *answers) as router:
            await app(path, budget=budget)(client.scope, client.receive, client.send)
        assert client.body == b"data: 1\n\n: waiting\n\ndata: 2\n\ndata: 3\n\n"
        assert not client.messages[-1].get("more_body")
        first, second = router.requests
        assert b"x-faasmoe-front: secret\r\n" in first
        assert b"x-faasmoe-journal" not in first
        assert first.endswith(BODY)
        assert b"x-faasmoe-journal: 13 2\r\n" in second
        assert second.endswith(b"\r\n\r\norigin\nentry\n" + BODY)
        assert budget.n_bytes == 0

    run(work)


def test_part_of_a_record_is_not_passed_on(path: Path) -> None:
    async def work() -> None:
        client = Client()
        async with FakeRouter(path, stream(FIRST, SECOND[:-3], is_whole=False), stream(SECOND)):
            await app(path)(client.scope, client.receive, client.send)
        assert client.body == b"data: 1\n\ndata: 2\n\n"

    run(work)


@pytest.mark.parametrize(
    "media_type",
    [b"text/event-stream", b"Text/Event-Stream;charset=utf-8", b"text/event-stream ; a=b"],
)
def test_events_of_a_router_without_records_are_passed_on_at_once(
    path: Path, media_type: bytes
) -> None:
    async def work() -> None:
        client = Client()

        async def answer(_: bytes, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n" % media_type)
            writer.write(b"transfer-encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n")
            await writer.drain()
            await client.has_body.wait()
            writer.write(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n")
            await writer.drain()

        async with FakeRouter(path, answer):
            await app(path)(client.scope, client.receive, client.send)
        assert client.body == b"data: 1\n\ndata: 2\n\n"

    run(work)


def test_request_without_an_answer_is_sent_again(path: Path) -> None:
    async def work() -> None:
        client = Client()
        async with FakeRouter(path, die, reply(b'{"a":1}')) as router:
            await app(path)(client.scope, client.receive, client.send)
        assert (client.status, client.body) == (200, b'{"a":1}')
        assert router.requests[0] == router.requests[1]

    run(work)


def test_probes_need_no_turn(path: Path) -> None:
    async def work() -> None:
        turns = SenderTurns(n_per_sender=0)
        gateway = GatewayApp(RouterAddress(str(path), "secret", 5.0), turns=turns)
        async with FakeRouter(path, reply(b"{}")) as router:
            waiting, probe = Client(), Client(body=b"", method="GET")
            posted = asyncio.create_task(gateway(waiting.scope, waiting.receive, waiting.send))
            await gateway(probe.scope, probe.receive, probe.send)
            assert probe.status == 200
            assert [request[:4] for request in router.requests] == [b"GET "]
            assert waiting.messages == []
            posted.cancel()
            await asyncio.gather(posted, return_exceptions=True)

    run(work)


def test_request_waits_for_a_router(path: Path) -> None:
    async def work() -> None:
        client = Client()
        running = asyncio.create_task(app(path)(client.scope, client.receive, client.send))
        for _ in range(3):
            await asyncio.sleep(0)
        assert client.messages == []
        async with FakeRouter(path, reply(b"{}")):
            await running
        assert client.status == 200

    run(work)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_router_that_stays_away_is_told(
    path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr("faasmoe_gateway.relay.PROBE_HOLD_S", 0.0)

    async def work() -> None:
        client = Client(body=b"", method=method)
        await app(path, hold_s=0.0)(client.scope, client.receive, client.send)
        assert client.status == 503
        assert (b"retry-after", b"1") in client.messages[0]["headers"]

    run(work)


def test_request_that_routers_die_of_fails(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_losses, "ONE_DEATH_S", 0.0)

    async def work() -> None:
        client = Client()
        async with FakeRouter(path, die) as router:
            await app(path)(client.scope, client.receive, client.send)
        assert client.status == 500
        assert len(router.requests) == MAX_FRUITLESS_DEATHS + 1

    run(work)


def test_connections_that_a_dying_router_takes_along_are_one_death(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router_losses, "ONE_DEATH_S", 3600.0)
    monkeypatch.setattr(relay, "RETRY_S", 0.0)

    async def work() -> None:
        client = Client()
        dying = [die] * (MAX_FRUITLESS_DEATHS + 3)
        answers = stream(FIRST, is_whole=False), *dying, stream(SECOND)
        async with FakeRouter(path, *answers):
            await app(path)(client.scope, client.receive, client.send)
        assert client.body == b"data: 1\n\ndata: 2\n\n"

    run(work)


def test_stream_that_has_not_told_anything_begins_again(path: Path) -> None:
    async def work() -> None:
        client = Client()
        answers = stream(is_whole=False), stream(WAITING, is_whole=False), stream(FIRST)
        async with FakeRouter(path, *answers) as router:
            await app(path)(client.scope, client.receive, client.send)
        assert client.body == b": waiting\n\ndata: 1\n\n"
        assert router.requests[0] == router.requests[1] == router.requests[2]

    run(work)


def test_events_before_a_damaged_record_reach_the_client(path: Path) -> None:
    async def work() -> None:
        client = Client()
        damaged = FIRST + bytes(len(SECOND))  # one chunk, and so most likely one piece
        async with FakeRouter(path, stream(damaged, is_whole=False), stream(SECOND)) as router:
            await app(path)(client.scope, client.receive, client.send)
        assert client.body == b"data: 1\n\ndata: 2\n\n"
        assert b"x-faasmoe-journal: 7 1\r\n" in router.requests[1]

    run(work)


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_connection_that_is_lost_before_anything_is_sent_over_it_ends_no_stream(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    open_connection, n_opened = RouterConnection.open, 0

    async def open_and_lose_second(address: str, **options: Any) -> RouterConnection:
        nonlocal n_opened
        n_opened += 1
        if n_opened != 2:
            return await open_connection(address, **options)
        with socket.socket(socket.AF_UNIX) as listener:  # accepts nothing before it is closed
            listener.bind(f"{address}.dying")
            listener.listen()
            connection = await open_connection(f"{address}.dying", **options)
        with pytest.raises(RouterLost):
            await connection.read_head()
        return connection

    monkeypatch.setattr(RouterConnection, "open", open_and_lose_second)

    async def work() -> None:
        client = Client()
        async with FakeRouter(path, stream(FIRST, is_whole=False), stream(SECOND)):
            await app(path)(client.scope, client.receive, client.send)
        assert client.body == b"data: 1\n\ndata: 2\n\n"
        assert n_opened == 3

    run(work, new_loop)


def test_stream_that_cannot_go_on_ends_with_an_error(path: Path) -> None:
    async def work() -> None:
        client = Client()
        answers = stream(FIRST, is_whole=False), reply(b'{"error":{}}', status=401)
        async with FakeRouter(path, *answers):
            await app(path)(client.scope, client.receive, client.send)
        first, last = client.body.decode().strip().split("\n\n")
        assert first == "data: 1"
        assert "restarted" in json.loads(last.removeprefix("data: "))["error"]["message"]

    run(work)


def test_stream_waits_for_a_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("faasmoe_gateway.relay.BUSY_RETRY_S", 0.0)

    async def work() -> None:
        client = Client()
        busy = [reply(b"{}", status=status) for status in (429, 503) * MAX_FRUITLESS_DEATHS]
        async with FakeRouter(path, stream(FIRST, is_whole=False), *busy, stream(SECOND)):
            await app(path)(client.scope, client.receive, client.send)
        assert client.body == b"data: 1\n\ndata: 2\n\n"

    run(work)


def test_stream_without_a_place_ends_with_an_error(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("faasmoe_gateway.relay.BUSY_RETRY_S", 0.0)

    async def work() -> None:
        client = Client()
        answers = stream(FIRST, is_whole=False), reply(b"{}", status=503)
        async with FakeRouter(path, *answers):
            await app(path, hold_s=0.2)(client.scope, client.receive, client.send)
        assert b"is overloaded" in client.body

    run(work)


def test_request_beyond_the_bounds_is_answered_but_not_repeated(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_request, "MAX_HELD_BODY_BYTES", 4)

    async def work() -> None:
        for answers, status in (((reply(b"{}"),), 200), ((die,), 503)):
            client = Client()
            async with FakeRouter(path, *answers) as router:
                await app(path)(client.scope, client.receive, client.send)
            assert client.status == status
            assert len(router.requests) == 1

    run(work)


def test_client_that_hangs_up_ends_its_request(path: Path) -> None:
    async def work() -> None:
        client, is_ended = Client(), asyncio.Event()

        async def hang(_: bytes, writer: asyncio.StreamWriter) -> None:
            client.hang_up()
            while not writer.transport.is_closing():
                writer.write(b" ")
                await asyncio.sleep(0.01)
            is_ended.set()

        async with FakeRouter(path, hang):
            await app(path)(client.scope, client.receive, client.send)
            await is_ended.wait()
        assert client.messages == []

    run(work)


def test_shutdown_ends_streams_with_an_error(path: Path) -> None:
    async def work() -> None:
        client, gateway = Client(), app(path)

        async def begin(body: bytes, writer: asyncio.StreamWriter) -> None:
            await stream(FIRST, is_whole=False)(body, writer)
            await client.has_body.wait()
            gateway.abort_running()

        async with FakeRouter(path, begin):
            await gateway(client.scope, client.receive, client.send)
        assert client.body.startswith(b"data: 1\n\ndata: ")
        assert b"The server is shutting down." in client.body

    run(work)


def test_headers_of_the_gateway_are_its_own(path: Path) -> None:
    async def work() -> None:
        client = Client(
            x_faasmoe_front="forged",
            x_faasmoe_journal="1 1",
            x_faasmoe_origin="forged 1",
            te="trailers",
        )
        async with FakeRouter(path, reply(b"{}")) as router:
            await app(path)(client.scope, client.receive, client.send)
        [request] = router.requests
        assert request.count(b"x-faasmoe-front") == request.count(b"x-faasmoe-origin") == 1
        assert b"forged" not in request
        assert b"x-faasmoe-journal" not in request
        assert b"te: " not in request

    run(work)


def test_router_that_ends_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "BUSY_RETRY_S", 0.0)

    async def work() -> None:
        client = Client()
        ending = reply(b"{}", status=503, x_faasmoe_draining=1)
        async with FakeRouter(path, ending, ending, reply(b"{1}")) as router:
            await app(path)(client.scope, client.receive, client.send)
        assert (client.status, client.body) == (200, b"{1}")
        assert len(router.requests) == 3

    run(work)


def test_probe_of_a_router_that_ends_is_told(path: Path) -> None:
    async def work() -> None:
        client = Client(method="GET", body=b"")
        async with FakeRouter(path, reply(b"{}", status=503, x_faasmoe_draining=1)):
            await app(path)(client.scope, client.receive, client.send)
        assert client.status == 503

    run(work)
