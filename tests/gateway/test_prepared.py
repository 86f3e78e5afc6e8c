"""A request has its sender's turn until the router has prepared it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_gateway import relay, turn_pacing
from faasmoe_gateway.app import GatewayApp
from faasmoe_gateway.held_request import (
    MAX_READ_AHEAD_BYTES,
    ClientGone,
    HeldRequest,
    HoldBudget,
)
from faasmoe_gateway.relay import ClientResponse, Relay, RouterAddress, WaitingRequests
from faasmoe_gateway.router_pool import RouterPool
from faasmoe_gateway.sender_turns import SenderTurns

LONG_S = 120.0
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


class WaitingRouter:
    """Prepares and answers requests, named by their bodies, when it is told to.

    Attributes:
        got: the requests, in the order of their arrival.
    """

    def __init__(self) -> None:
        self.got: list[bytes] = []
        self._changed = asyncio.Condition()
        self._writers: dict[bytes, asyncio.StreamWriter] = {}
        self._all_writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Read a request, and keep its connection."""
        self._all_writers.append(writer)
        head = await reader.readuntil(b"\r\n\r\n")
        fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
        body = await reader.read(int(fields[b"content-length"]))
        async with self._changed:
            self.got.append(body)
            self._writers[body] = writer
            self._changed.notify_all()

    async def wait_for(self, n_requests: int) -> None:
        """Wait until it has got so many requests."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.got) >= n_requests)

    async def close(self) -> None:
        """End all connections."""
        for writer in self._all_writers:
            writer.close()
        await asyncio.gather(
            *(writer.wait_closed() for writer in self._all_writers), return_exceptions=True
        )

    def tell_prepared(self, body: bytes) -> None:
        """Say that a request is prepared."""
        self._writers[body].write(b"HTTP/1.1 102 Processing\r\n\r\n")

    def answer(self, body: bytes) -> None:
        """Answer a request."""
        self._writers[body].write(ANSWER)


class Senders:
    """Sends requests through a gateway's relay.

    Attributes:
        budget: of what they hold.
        turns: of their senders, two each.
        router: where the router is.
    """

    def __init__(self, path: Path) -> None:
        self.budget = HoldBudget()
        self.turns = SenderTurns(n_per_sender=2)
        self.router = RouterAddress(str(path), "secret", 5.0)

    def send(
        self, sender: str, body: bytes, *, n_sent: int | None = None
    ) -> asyncio.Task[list[dict[str, Any]]]:
        """Send a request, perhaps only a part of its body; its result is what the client got."""
        return asyncio.create_task(self._send(sender, body, n_sent))

    async def _send(self, sender: str, body: bytes, n_sent: int | None) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        is_whole = n_sent is None
        incoming = [{"type": "http.request", "body": body[:n_sent], "more_body": not is_whole}]

        async def receive() -> Any:
            return incoming.pop() if incoming else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            messages.append(dict(message))

        request = HeldRequest(scope_of(body), receive, self.budget)
        try:
            await Relay(
                request,
                ClientResponse(send, is_messages=False),
                self.router,
                WaitingRequests(),
                pool=RouterPool(),
                take_turn=partial(self.turns.take, sender),
                keeps_turn=bool(sender),
            ).run()
        finally:
            request.release()
        return messages


def scope_of(body: bytes) -> dict[str, Any]:
    return {
        "method": "POST",
        "raw_path": b"/v1/completions",
        "query_string": b"",
        "headers": [(b"host", b"a"), (b"content-length", b"%d" % len(body))],
    }


Work = Callable[[WaitingRouter, Senders], Awaitable[None]]


@asynccontextmanager
async def listening(router: WaitingRouter, path: Path) -> AsyncIterator[None]:
    server = await asyncio.start_unix_server(router.serve, path)
    try:
        yield
    finally:
        server.close()
        await router.close()


def run(work: Work) -> None:
    async def bounded() -> None:
        with tempfile.TemporaryDirectory(prefix="gw-") as folder:  # tmp_path may be too long
            path = Path(folder) / "router.sock"
            router = WaitingRouter()
            async with asyncio.timeout(LONG_S), listening(router, path):
                await work(router, Senders(path))

    asyncio.run(bounded())


@pytest.fixture
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "MAX_TURN_S", LONG_S)


@pytest.mark.usefixtures("_patient")
@pytest.mark.parametrize("how", [WaitingRouter.tell_prepared, WaitingRouter.answer])
def test_a_senders_next_request_is_sent_once_one_is_prepared_or_answered(
    how: Callable[[WaitingRouter, bytes], None],
) -> None:
    async def work(router: WaitingRouter, senders: Senders) -> None:
        flood = [senders.send("flood", b"f%d" % n) for n in range(4)]
        await router.wait_for(2)
        quiet = senders.send("quiet", b"q")
        await router.wait_for(3)
        assert router.got[2] == b"q"  # the flood's others wait for the first two
        how(router, b"f1")
        await router.wait_for(4)
        assert sorted(router.got) == [b"f0", b"f1", b"f2", b"q"]
        how(router, b"f0")
        await router.wait_for(5)
        for body in router.got:
            if how is WaitingRouter.tell_prepared or body not in (b"f0", b"f1"):
                router.answer(body)
        for messages in await asyncio.gather(quiet, *flood):
            assert [m["status"] for m in messages if "status" in m] == [200]
        assert senders.budget.n_bytes == 0

    run(work)


@pytest.mark.usefixtures("_patient")
def test_the_router_knows_nothing_of_requests_whose_clients_leave_while_they_wait() -> None:
    async def work(router: WaitingRouter, senders: Senders) -> None:
        flood = [senders.send("flood", b"f%d" % n) for n in range(20)]
        await router.wait_for(2)
        for task in flood[2:19]:
            task.cancel()
        await asyncio.gather(*flood[2:19], return_exceptions=True)
        flood[0].cancel()  # and a turn is given back by those who have it
        await router.wait_for(3)
        assert router.got == [b"f0", b"f1", b"f19"]
        for body in router.got[1:]:
            router.answer(body)
        await asyncio.gather(*flood, return_exceptions=True)
        assert senders.budget.n_bytes == 0
        assert all(senders.turns.ask("flood").done() for _ in range(2))

    run(work)


def test_a_router_that_does_not_say_so_delays_a_sender_for_a_moment_only() -> None:
    async def work(router: WaitingRouter, senders: Senders) -> None:
        flood = [senders.send("flood", b"f%d" % n) for n in range(5)]
        await router.wait_for(5)
        for body in router.got:
            router.answer(body)
        await asyncio.gather(*flood)

    run(work)


@pytest.mark.usefixtures("_patient")
def test_a_gateway_of_one_router_keeps_the_turns_of_keys() -> None:
    async def work(router: WaitingRouter, senders: Senders) -> None:
        gateway = GatewayApp(senders.router, turns=senders.turns)
        key = (b"authorization", b"Bearer key")
        tasks = [asyncio.create_task(post(gateway, b"k%d" % n, key)) for n in range(3)]
        await router.wait_for(2)
        quiet = senders.send("quiet", b"q")
        await router.wait_for(3)
        assert router.got == [b"k0", b"k1", b"q"]
        for body in (b"q", b"k0"):
            router.answer(body)
        await router.wait_for(4)
        for body in (b"k1", b"k2"):
            router.answer(body)
        assert await asyncio.gather(*tasks) == [200] * 3
        await quiet

    run(work)


@pytest.mark.usefixtures("_patient")
def test_beside_others_a_senders_next_request_waits_for_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(turn_pacing, "PAUSE_FACTOR", 1e9)
    monkeypatch.setattr(turn_pacing, "MAX_PAUSE_S", LONG_S)
    monkeypatch.setattr(turn_pacing, "ACTIVE_S", LONG_S)

    async def work(router: WaitingRouter, senders: Senders) -> None:
        gateway = GatewayApp(senders.router)
        n_got = 0

        async def post_answered(name: str) -> None:
            nonlocal n_got
            task = asyncio.create_task(post(gateway, name.encode(), key_of(name[0])))
            n_got += 1
            await router.wait_for(n_got)
            router.answer(name.encode())
            assert await task == 200

        await post_answered("f0")  # from now on the gateway knows this key
        for number in range(1, 5):
            await post_answered(f"f{number}")  # without a pause, as there is nobody else
        await post_answered("q0")  # as a stranger's, which makes nobody pause
        await post_answered("f5")
        await post_answered("q1")
        await post_answered("f6")  # has one of two turns, which pauses from now on
        await post_answered("f7")
        waiting = asyncio.create_task(post(gateway, b"f8", key_of("f")))
        await post_answered("q2")
        assert b"f8" not in router.got
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    run(work)


def key_of(sender: str) -> tuple[bytes, bytes]:
    return b"authorization", b"Bearer " + sender.encode()


async def post(gateway: GatewayApp, body: bytes, *headers: tuple[bytes, bytes]) -> int:
    """Send a request to a gateway; return the status of its answer."""
    scope = scope_of(body)
    scope |= {"type": "http", "headers": [*scope["headers"], *headers]}
    incoming = [{"type": "http.request", "body": body, "more_body": False}]
    statuses: list[int] = []

    async def receive() -> Any:
        return incoming.pop() if incoming else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        statuses.extend([message["status"]] if "status" in message else [])

    await gateway(scope, receive, send)
    return statuses[0]


@pytest.mark.usefixtures("_patient")
def test_strangers_do_not_wait_for_each_others_preparation() -> None:
    async def work(router: WaitingRouter, senders: Senders) -> None:
        tasks = [senders.send("", b"s%d" % n) for n in range(6)]
        await router.wait_for(6)
        for body in router.got:
            router.answer(body)
        await asyncio.gather(*tasks)

    run(work)


@pytest.mark.usefixtures("_patient")
def test_what_waits_for_its_client_has_no_turn() -> None:
    async def work(router: WaitingRouter, senders: Senders) -> None:
        small = [senders.send("flood", b"s%d" % n, n_sent=1) for n in range(3)]
        large = bytes(MAX_READ_AHEAD_BYTES + 1)
        tasks = [*small, *(senders.send("flood", large, n_sent=1) for _ in range(3))]
        await router.wait_for(3)  # the large ones, as they come
        whole = senders.send("flood", b"whole")
        await router.wait_for(4)
        assert router.got == [b"\0", b"\0", b"\0", b"whole"]
        router.answer(b"whole")
        await whole
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert senders.budget.n_bytes == 0

    run(work)


@given(
    st.lists(st.binary(max_size=6), max_size=5),
    st.integers(0, 40),
    st.integers(0, 3),
)
def test_reading_ahead_holds_what_is_announced_until_the_request_ends(
    parts: list[bytes], max_bytes: int, n_received: int
) -> None:
    body = b"".join(parts)
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": part, "more_body": index < len(parts) - 1}
        for index, part in enumerate(parts)
    ] or [{"type": "http.request", "body": b"", "more_body": False}]
    is_cut = n_received < len(messages)
    incoming = [*messages[:n_received], {"type": "http.disconnect"}] if is_cut else messages
    budget, stream = HoldBudget(max_bytes), iter(incoming)
    request = HeldRequest(scope_of(body), partial(_next_of, stream), budget)

    async def work() -> bool:
        return await request.read_ahead()

    if not body or len(body) > max_bytes:
        assert asyncio.run(work()) is not bool(body)
        assert budget.n_bytes == 0
    elif is_cut:
        with pytest.raises(ClientGone):
            asyncio.run(work())
        assert budget.n_bytes == len(body)
    else:
        assert asyncio.run(work())
        assert budget.n_bytes == len(body)
    request.release()
    assert budget.n_bytes == 0


async def _next_of(messages: Any) -> Any:
    return next(messages)
