"""Pending responses delay later requests of their connection, but not other connections."""

from __future__ import annotations

import asyncio
from asyncio import Future
from collections.abc import Callable, Coroutine
from typing import Any

from faasmoe_expert.server.connection import HttpConnection
from faasmoe_expert.server.http import HttpRequest, HttpResponse

DEADLINE_S = 120.0
Scenario = Callable[["FakeServer"], Coroutine[Any, Any, None]]


class Client:
    """A client connection to a FakeServer."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    def send_requests(self, *targets: str) -> None:
        """Send pipelined GET requests."""
        requests = (f"GET /{target} HTTP/1.1\r\nhost: test\r\n\r\n" for target in targets)
        self.writer.write("".join(requests).encode())

    async def read_response(self) -> str:
        """Return the status and body of the next response; empty at the end of the connection."""
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            return error.partial.decode()
        status, _, rest = head.decode().partition("\r\n")
        size = int(rest.partition("content-length: ")[2].partition("\r\n")[0])
        body = await self._reader.readexactly(size)
        return f"{status.split()[1]} {body.decode()}"


class FakeServer:
    """A server whose responses to /slow... are pending until the test resolves them."""

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
        """Close all connections and wait for them."""
        for client in self._clients:
            client.writer.close()
        closed = (client.writer.wait_closed() for client in self._clients)
        await asyncio.gather(*closed, return_exceptions=True)
        for connection in tuple(self.connections):
            connection.abort()
            await connection.closed

    async def wait_for_request(self, target: str) -> Future[HttpResponse]:
        """Wait for a request to /`target`; return the future of its response."""
        while target not in self.pending:
            self._seen.clear()
            await self._seen.wait()
        return self.pending[target]


def run_scenario(scenario: Scenario, *, idle_timeout_s: float = DEADLINE_S) -> None:
    async def run() -> None:
        fake_server = FakeServer()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: HttpConnection(
                fake_server.handle,
                fake_server.connections,
                timeout_s=DEADLINE_S,
                idle_timeout_s=idle_timeout_s,
            ),
            "127.0.0.1",
            0,
        )
        fake_server.address = server.sockets[0].getsockname()[:2]
        async with asyncio.timeout(DEADLINE_S):
            await scenario(fake_server)
            await fake_server.close()
        server.close()

    asyncio.run(run())


LATE_RESPONSE = HttpResponse(200, "text/plain", [b"at last"])


def test_answers_other_connections_while_a_response_is_pending() -> None:
    async def scenario(fake_server: FakeServer) -> None:
        one, other = await fake_server.client(), await fake_server.client()
        one.send_requests("slow")
        pending = await fake_server.wait_for_request("slow")
        other.send_requests("fast")
        assert await other.read_response() == "200 fast"
        pending.set_result(LATE_RESPONSE)
        assert await one.read_response() == "200 at last"

    run_scenario(scenario)


def test_answers_later_requests_of_the_connection_in_order() -> None:
    async def scenario(fake_server: FakeServer) -> None:
        client = await fake_server.client()
        client.send_requests("slow1", "a", "slow2", "b")
        (await fake_server.wait_for_request("slow1")).set_result(LATE_RESPONSE)
        (await fake_server.wait_for_request("slow2")).set_result(LATE_RESPONSE)
        responses = [await client.read_response() for _ in range(4)]
        assert responses == ["200 at last", "200 a", "200 at last", "200 b"]
        client.send_requests("c")
        assert await client.read_response() == "200 c"

    run_scenario(scenario)


def test_sends_a_rejection_after_the_pending_response() -> None:
    async def scenario(fake_server: FakeServer) -> None:
        client = await fake_server.client()
        client.send_requests("slow")
        client.writer.write(b"no HTTP at all\r\n\r\n")
        (await fake_server.wait_for_request("slow")).set_result(LATE_RESPONSE)
        assert await client.read_response() == "200 at last"
        assert (await client.read_response()).startswith("400")
        assert await client.read_response() == ""

    run_scenario(scenario)


def test_close_waits_for_the_pending_response() -> None:
    async def scenario(fake_server: FakeServer) -> None:
        client = await fake_server.client()
        client.send_requests("slow", "never")
        pending = await fake_server.wait_for_request("slow")
        for connection in tuple(fake_server.connections):
            connection.close()
        pending.set_result(LATE_RESPONSE)
        assert await client.read_response() == "200 at last"
        assert await client.read_response() == ""

    run_scenario(scenario)


def test_disconnects_and_cancelled_responses_do_not_affect_other_connections() -> None:
    async def scenario(fake_server: FakeServer) -> None:
        disconnecting, waiting, other = [await fake_server.client() for _ in range(3)]
        disconnecting.send_requests("slow1")
        pending = await fake_server.wait_for_request("slow1")
        disconnecting.writer.transport.abort()
        waiting.send_requests("slow2")
        (await fake_server.wait_for_request("slow2")).cancel()
        pending.set_result(LATE_RESPONSE)
        other.send_requests("fast")
        assert await other.read_response() == "200 fast"

    run_scenario(scenario)


def test_connection_with_a_pending_response_is_not_idle() -> None:
    async def scenario(fake_server: FakeServer) -> None:
        client = await fake_server.client()
        client.send_requests("slow")
        pending = await fake_server.wait_for_request("slow")
        asyncio.get_running_loop().call_later(0.9, pending.set_result, LATE_RESPONSE)
        assert await client.read_response() == "200 at last"

    run_scenario(scenario, idle_timeout_s=0.3)
