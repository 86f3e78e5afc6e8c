"""Small requests take turns of their tenants, until something else bounds them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from faasmoe_router.api.preparation import INLINE_BYTES, PreparationQueue, release_turn
from faasmoe_router.api.turns import TurnMiddleware
from faasmoe_router.tenants.service import Caller

N_STEPS = 5


class Client:
    """A client with one request, whose body comes in parts."""

    def __init__(self, tenant: str, *parts: bytes, method: str = "POST") -> None:
        self.scope = {"type": "http", "method": method, "state": {"caller": Caller(tenant)}}
        self.gone = asyncio.Event()
        self.more = asyncio.Event()
        self.more.set()
        self._parts = [
            {"type": "http.request", "body": part, "more_body": index < len(parts) - 1}
            for index, part in enumerate(parts)
        ]

    async def receive(self) -> Any:
        if self._parts:
            await self.more.wait()
            return self._parts.pop(0)
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        raise AssertionError(message)


class App:
    """Handles each request in a few steps of the event loop; notes the order of their ends."""

    def __init__(self) -> None:
        self.finished: list[tuple[str, bytes]] = []
        self.middleware = TurnMiddleware(self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
        for _ in range(N_STEPS):
            await asyncio.sleep(0)
        self.finished.append((scope["state"]["caller"].tenant, body))

    def start(self, client: Client) -> asyncio.Task[None]:
        return asyncio.create_task(self.middleware(client.scope, client.receive, client.send))


def test_a_quiet_tenant_passes_those_that_arrived_before_it() -> None:
    async def work() -> None:
        app = App()
        flood = [app.start(Client("flood", b"a")) for _ in range(20)]
        await asyncio.gather(*flood, app.start(Client("quiet", b"q")))
        assert app.finished.index(("quiet", b"q")) <= 1

    asyncio.run(work())


def test_a_request_whose_client_leaves_while_it_waits_is_dropped() -> None:
    async def work() -> None:
        app = App()
        clients = [Client("flood", bytes([number])) for number in range(3)]
        tasks = [app.start(client) for client in clients]
        await asyncio.sleep(0)
        clients[1].gone.set()
        await asyncio.gather(*tasks)
        assert app.finished == [("flood", b"\0"), ("flood", b"\2")]

    asyncio.run(work())


def test_a_cancelled_wait_passes_the_turn_on() -> None:
    async def work() -> None:
        app = App()
        tasks = [app.start(Client("flood", bytes([number]))) for number in range(3)]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert app.finished == [("flood", b"\0"), ("flood", b"\2")]

    asyncio.run(work())


@pytest.mark.parametrize(
    "slow",
    [(b"a", b"b"), (b"a" * INLINE_BYTES, b"bc")],
    ids=["small body in parts", "large body"],
)
def test_a_slow_body_holds_no_turn(slow: tuple[bytes, ...]) -> None:
    async def work() -> None:
        app = App()
        dribbling = Client("flood", *slow)
        dribbling.more.clear()
        first = app.start(dribbling)
        await app.start(Client("flood", b"other"))
        assert app.finished == [("flood", b"other")]
        dribbling.more.set()
        await first
        assert app.finished[1:] == [("flood", b"".join(slow))]

    asyncio.run(work())


class HoldingApp:
    """Handles requests until `may_end`; those named so give up their turn before."""

    def __init__(self) -> None:
        self.begun: list[bytes] = []
        self.may_end = asyncio.Event()
        self.has_begun = asyncio.Condition()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"]
        if body == b"thread":
            async with PreparationQueue() as queue:
                await queue.run_in_turn(scope["state"]["caller"], lambda: None)
        elif body == b"generates":
            release_turn()
        self.begun.append(body)
        async with self.has_begun:
            self.has_begun.notify_all()
        await self.may_end.wait()


def bodies_begun(n: int, *clients: Client) -> list[bytes]:
    """Send requests, none of which ends; return the bodies of the first `n` that begin."""

    async def work() -> list[bytes]:
        app = HoldingApp()
        middleware = TurnMiddleware(app)
        tasks = [asyncio.create_task(middleware(c.scope, c.receive, c.send)) for c in clients]
        async with asyncio.timeout(120), app.has_begun:
            await app.has_begun.wait_for(lambda: len(app.begun) >= n)
        begun = list(app.begun)
        app.may_end.set()
        await asyncio.gather(*tasks)
        return begun

    return asyncio.run(work())


def test_what_waits_for_a_thread_or_generates_holds_no_turn() -> None:
    clients = [Client("acme", body) for body in (b"thread", b"generates", b"holds", b"waits")]
    assert sorted(bodies_begun(3, *clients)) == [b"generates", b"holds", b"thread"]


def test_reading_waits_for_no_turn() -> None:
    reads = Client("acme", b"", method="GET")
    assert sorted(bodies_begun(2, Client("acme", b"holds"), reads)) == [b"", b"holds"]
