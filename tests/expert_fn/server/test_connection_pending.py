"""Answers that are to come: others do not wait for them, those behind them do."""

from __future__ import annotations

import asyncio
from asyncio import Future
from collections.abc import Callable, Coroutine
from typing import Any

from faasmoe_expert.server.connection import HttpConnection
from faasmoe_expert.server.http import HttpRequest, HttpResponse

DEADLINE_S = 20.0
Scenario = Callable[["FakeServer"], Coroutine[Any, Any, None]]


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    def send_requests(self, *targets: str) -> None:
        """Send requests, one right after the other."""
        asked = (f"GET /{target} HTTP/1.1\r\nhost: test\r\n\r\n" for target in targets)
        self.writer.write("".join(asked).encode())

    async def read_response(self) -> str:
        """The next answer's status and body; empty at the end."""
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            return error.partial.decode()
        status, _, rest = head.decode().partition("\r\n")
        size = int(rest.partition("content-length: ")[2].partition("\r\n")[0])
        body = await self._reader.readexactly(size)
        return f"{status.split()[1]} {body.decode()}"


class FakeServer:
    """A server whose answers to /slow... come when the test says so."""

    def __init__(self) -> None:
        self.pending: dict[str, Future[HttpResponse]] = {}
        self.connections: set[HttpConnection] = set()
        self.address: tuple[str, int] = ("", 0)
        self._seen = asyncio.Event()
        self._clients: list[Client] = []

    def handle(self, request: HttpRequest) -> HttpResponse | Future[HttpResponse]:
        target = request.target.decode()[1:]
        self._seen.set()
        if not target.startswith("slow"):
            return HttpResponse(200, "text/plain", [target.encode()])
        return self.pending.setdefault(target, asyncio.get_running_loop().create_future())

    async def client(self) -> Client:
        self._clients.append(Client(*await asyncio.open_connection(*self.address)))
        return self._clients[-1]

    async def close(self) -> None:
        """Close every connection, and wait until they are closed."""
        for client in self._clients:
            client.writer.close()
        closed = (client.writer.wait_closed() for client in self._clients)
        await asyncio.gather(*closed, return_exceptions=True)
        for connection in tuple(self.connections):
            connection.abort()
            await connection.closed

    async def wait_for_request(self, target: str) -> Future[HttpResponse]:
        """Wait until a slow answer is asked for."""
        while target not in self.pending:
            self._seen.clear()
            await self._seen.wait()
        return self.pending[target]


def run_scenario(scenario: Scenario, *, idle_timeout_s: float = DEADLINE_S) -> None:
    async def run() -> None:
        stage = FakeServer()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: HttpConnection(
                stage.handle, stage.connections, timeout_s=DEADLINE_S, idle_timeout_s=idle_timeout_s
            ),
            "127.0.0.1",
            0,
        )
        stage.address = server.sockets[0].getsockname()[:2]
        async with asyncio.timeout(DEADLINE_S):
            await scenario(stage)
            await stage.close()
        server.close()

    asyncio.run(run())


LATE_RESPONSE = HttpResponse(200, "text/plain", [b"at last"])


def test_other_connections_are_answered_meanwhile() -> None:
    async def story(stage: FakeServer) -> None:
        one, other = await stage.client(), await stage.client()
        one.send_requests("slow")
        coming = await stage.wait_for_request("slow")
        other.send_requests("fast")
        assert await other.read_response() == "200 fast"
        coming.set_result(LATE_RESPONSE)
        assert await one.read_response() == "200 at last"

    run_scenario(story)


def test_requests_behind_it_are_answered_after_it_in_order() -> None:
    async def story(stage: FakeServer) -> None:
        client = await stage.client()
        client.send_requests("slow1", "a", "slow2", "b")
        (await stage.wait_for_request("slow1")).set_result(LATE_RESPONSE)
        (await stage.wait_for_request("slow2")).set_result(LATE_RESPONSE)
        answers = [await client.read_response() for _ in range(4)]
        assert answers == ["200 at last", "200 a", "200 at last", "200 b"]
        client.send_requests("c")
        assert await client.read_response() == "200 c"

    run_scenario(story)


def test_what_is_refused_behind_it_is_refused_after_it() -> None:
    async def story(stage: FakeServer) -> None:
        client = await stage.client()
        client.send_requests("slow")
        client.writer.write(b"no HTTP at all\r\n\r\n")
        (await stage.wait_for_request("slow")).set_result(LATE_RESPONSE)
        assert await client.read_response() == "200 at last"
        assert (await client.read_response()).startswith("400")
        assert await client.read_response() == ""

    run_scenario(story)


def test_closing_lets_it_be_answered_first() -> None:
    async def story(stage: FakeServer) -> None:
        client = await stage.client()
        client.send_requests("slow", "never")
        coming = await stage.wait_for_request("slow")
        for connection in tuple(stage.connections):
            connection.close()
        coming.set_result(LATE_RESPONSE)
        assert await client.read_response() == "200 at last"
        assert await client.read_response() == ""

    run_scenario(story)


def test_a_client_that_leaves_and_an_answer_that_is_cancelled_harm_nobody() -> None:
    async def story(stage: FakeServer) -> None:
        leaves, stays, other = [await stage.client() for _ in range(3)]
        leaves.send_requests("slow1")
        coming = await stage.wait_for_request("slow1")
        leaves.writer.transport.abort()
        stays.send_requests("slow2")
        (await stage.wait_for_request("slow2")).cancel()
        coming.set_result(LATE_RESPONSE)
        other.send_requests("fast")
        assert await other.read_response() == "200 fast"

    run_scenario(story)


def test_a_connection_that_waits_for_its_answer_is_not_idle() -> None:
    async def story(stage: FakeServer) -> None:
        client = await stage.client()
        client.send_requests("slow")
        coming = await stage.wait_for_request("slow")
        asyncio.get_running_loop().call_later(0.3, coming.set_result, LATE_RESPONSE)
        assert await client.read_response() == "200 at last"

    run_scenario(story, idle_timeout_s=0.1)
