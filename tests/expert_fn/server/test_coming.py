"""Answers that are to come: others do not wait for them, those behind them do."""

from __future__ import annotations

import asyncio
from asyncio import Future
from collections.abc import Callable, Coroutine
from typing import Any

from faasmoe_expert.server.answer import Answer
from faasmoe_expert.server.protocol import HttpProtocol
from faasmoe_expert.server.request import HttpRequest

DEADLINE_S = 20.0
Story = Callable[["Stage"], Coroutine[Any, Any, None]]


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    def ask(self, *targets: str) -> None:
        """Send requests, one right after the other."""
        asked = (f"GET /{target} HTTP/1.1\r\nhost: test\r\n\r\n" for target in targets)
        self.writer.write("".join(asked).encode())

    async def answer(self) -> str:
        """The next answer's status and body; empty at the end."""
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError as error:
            return error.partial.decode()
        status, _, rest = head.decode().partition("\r\n")
        size = int(rest.partition("content-length: ")[2].partition("\r\n")[0])
        body = await self._reader.readexactly(size)
        return f"{status.split()[1]} {body.decode()}"


class Stage:
    """A server whose answers to /slow... come when the test says so."""

    def __init__(self) -> None:
        self.coming: dict[str, Future[Answer]] = {}
        self.connections: set[HttpProtocol] = set()
        self.address: tuple[str, int] = ("", 0)
        self._seen = asyncio.Event()
        self._clients: list[Client] = []

    def handle(self, request: HttpRequest) -> Answer | Future[Answer]:
        target = request.target.decode()[1:]
        self._seen.set()
        if not target.startswith("slow"):
            return Answer(200, "text/plain", [target.encode()])
        return self.coming.setdefault(target, asyncio.get_running_loop().create_future())

    async def client(self) -> Client:
        self._clients.append(Client(*await asyncio.open_connection(*self.address)))
        return self._clients[-1]

    async def end(self) -> None:
        """Close every connection, and wait until they are closed."""
        for client in self._clients:
            client.writer.close()
        closed = (client.writer.wait_closed() for client in self._clients)
        await asyncio.gather(*closed, return_exceptions=True)
        for connection in tuple(self.connections):
            connection.abort()
            await connection.closed

    async def asked(self, target: str) -> Future[Answer]:
        """Wait until a slow answer is asked for."""
        while target not in self.coming:
            self._seen.clear()
            await self._seen.wait()
        return self.coming[target]


def play(story: Story, *, idle_timeout_s: float = DEADLINE_S) -> None:
    async def run() -> None:
        stage = Stage()
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: HttpProtocol(
                stage.handle, stage.connections, timeout_s=DEADLINE_S, idle_timeout_s=idle_timeout_s
            ),
            "127.0.0.1",
            0,
        )
        stage.address = server.sockets[0].getsockname()[:2]
        async with asyncio.timeout(DEADLINE_S):
            await story(stage)
            await stage.end()
        server.close()

    asyncio.run(run())


SAID = Answer(200, "text/plain", [b"at last"])


def test_other_connections_are_answered_meanwhile() -> None:
    async def story(stage: Stage) -> None:
        one, other = await stage.client(), await stage.client()
        one.ask("slow")
        coming = await stage.asked("slow")
        other.ask("fast")
        assert await other.answer() == "200 fast"
        coming.set_result(SAID)
        assert await one.answer() == "200 at last"

    play(story)


def test_requests_behind_it_are_answered_after_it_in_order() -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client()
        client.ask("slow1", "a", "slow2", "b")
        (await stage.asked("slow1")).set_result(SAID)
        (await stage.asked("slow2")).set_result(SAID)
        answers = [await client.answer() for _ in range(4)]
        assert answers == ["200 at last", "200 a", "200 at last", "200 b"]
        client.ask("c")
        assert await client.answer() == "200 c"

    play(story)


def test_what_is_refused_behind_it_is_refused_after_it() -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client()
        client.ask("slow")
        client.writer.write(b"no HTTP at all\r\n\r\n")
        (await stage.asked("slow")).set_result(SAID)
        assert await client.answer() == "200 at last"
        assert (await client.answer()).startswith("400")
        assert await client.answer() == ""

    play(story)


def test_closing_lets_it_be_answered_first() -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client()
        client.ask("slow", "never")
        coming = await stage.asked("slow")
        for connection in tuple(stage.connections):
            connection.close()
        coming.set_result(SAID)
        assert await client.answer() == "200 at last"
        assert await client.answer() == ""

    play(story)


def test_a_client_that_leaves_and_an_answer_that_is_cancelled_harm_nobody() -> None:
    async def story(stage: Stage) -> None:
        leaves, stays, other = [await stage.client() for _ in range(3)]
        leaves.ask("slow1")
        coming = await stage.asked("slow1")
        leaves.writer.transport.abort()
        stays.ask("slow2")
        (await stage.asked("slow2")).cancel()
        coming.set_result(SAID)
        other.ask("fast")
        assert await other.answer() == "200 fast"

    play(story)


def test_a_connection_that_waits_for_its_answer_is_not_idle() -> None:
    async def story(stage: Stage) -> None:
        client = await stage.client()
        client.ask("slow")
        coming = await stage.asked("slow")
        asyncio.get_running_loop().call_later(0.3, coming.set_result, SAID)
        assert await client.answer() == "200 at last"

    play(story, idle_timeout_s=0.1)
