"""Connections to routers over TCP that are kept from one request to the next."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
from tests.gateway.fake_router import reply
from tests.gateway.test_relay import BODY, Client, run
from tls_folders import MODELS, tls_peer, write_tls_folder

from faasmoe_contracts.tls import GATEWAY_NAME, TlsFolder, TlsPeer
from faasmoe_gateway import held_request, relay
from faasmoe_gateway.app import GatewayApp
from faasmoe_gateway.relay import RouterAddress
from faasmoe_gateway.router_pool import RouterKey, RouterPool
from faasmoe_gateway.upstream import RouterConnection

Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]
OK = reply(b"{}")


async def end(_: bytes, writer: asyncio.StreamWriter) -> None:
    """End the connection without an answer."""
    writer.close()


class KeepingRouter:
    """A router on TCP that keeps its connections, and answers each request as a test says.

    Attributes:
        requests: head and body of each request, by connection.
        address: where it listens.
    """

    def __init__(self, *answers: Answer, tls: TlsFolder | None = None) -> None:
        self.requests: list[list[bytes]] = []
        self.address = ""
        self._answers = list(answers)
        self._tls = tls
        self._writers: list[asyncio.StreamWriter] = []
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> KeepingRouter:
        context = None if self._tls is None else self._tls.server_context()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=context)
        host, port = self._server.sockets[0].getsockname()
        self.address = f"{host}:{port}"
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await self.wait_until_ended(len(self._writers))

    async def wait_until_ended(self, n_connections: int) -> None:
        """Wait until so many connections have ended."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._n_ended >= n_connections)

    def write_to(self, connection: int, data: bytes) -> None:
        """Write what nobody asked for."""
        self._writers[connection].write(data)

    def end(self, connection: int) -> None:
        """End a connection."""
        self._writers[connection].close()

    _n_ended = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests: list[bytes] = []
        self.requests.append(requests)
        self._writers.append(writer)
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:] if line)
                body = await reader.readexactly(int(fields.get(b"content-length", b"0")))
                requests.append(head + body)
                answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
                await answer(body, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()
            async with self._changed:
                self._n_ended += 1
                self._changed.notify_all()


def gateway(router: KeepingRouter, *, tls: TlsPeer | None = None, **pool: Any) -> GatewayApp:
    address = RouterAddress(router.address, "secret", 5.0, tls)
    return GatewayApp(address, pool=RouterPool(**pool))


async def ask(app: GatewayApp, client: Client | None = None) -> Client:
    client = client or Client(authorization="Bearer key")  # its body is read first
    await app(client.scope, client.receive, client.send)
    return client


async def lifespan(app: GatewayApp) -> None:
    """Start an app and shut it down."""
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(_: Any) -> None:
        pass

    await app({"type": "lifespan"}, receive, send)


def counts(router: KeepingRouter) -> list[int]:
    """Return the number of requests on each connection."""
    return [len(requests) for requests in router.requests]


def test_requests_one_after_the_other_share_a_connection() -> None:
    async def work() -> None:
        async with KeepingRouter(OK) as router:
            app = gateway(router)
            for _ in range(3):
                assert (await ask(app)).status == 200
            assert counts(router) == [3]
            assert b"connection: close" not in router.requests[0][0]

    run(work)


def test_requests_share_one_handshake_with_a_router_that_has_a_certificate(tmp_path: Path) -> None:
    async def work() -> None:
        folder = TlsFolder(write_tls_folder(tmp_path / "router", MODELS))
        async with KeepingRouter(OK, tls=folder) as router:
            app = gateway(router, tls=tls_peer(tmp_path / "gateway", GATEWAY_NAME))
            for _ in range(3):
                assert (await ask(app)).status == 200
            assert counts(router) == [3]

    run(work)


def test_requests_at_once_have_connections_of_their_own() -> None:
    async def work() -> None:
        both = asyncio.Barrier(2)

        async def answer(body: bytes, writer: asyncio.StreamWriter) -> None:
            await both.wait()
            await OK(body, writer)

        async with KeepingRouter(answer) as router:
            app = gateway(router)
            for _ in range(2):
                clients = await asyncio.gather(ask(app), ask(app))
                assert [client.status for client in clients] == [200, 200]
            assert counts(router) == [2, 2]

    run(work)


@pytest.mark.parametrize("what", [b"", b"HTTP/1.1 408 X\r\ncontent-length: 0\r\n\r\n"])
def test_connection_that_the_router_ended_or_wrote_to_is_not_used(what: bytes) -> None:
    async def work() -> None:
        async with KeepingRouter(OK) as router:
            app = gateway(router)
            await ask(app)
            if what:
                router.write_to(0, what)
            else:
                router.end(0)
            await router.wait_until_ended(1)
            client = await ask(app)
            assert client.status == 200
            assert counts(router) == [1, 1]

    run(work)


def test_request_on_a_connection_that_ends_just_then_is_sent_over_a_new_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(relay, "MAX_HELD_REQUESTS", 0)  # nothing waits for a router

    async def work() -> None:
        async with KeepingRouter(OK, end, OK) as router:
            app = gateway(router)
            await ask(app)
            client = await ask(app)
            assert (client.status, client.body) == (200, b"{}")
            (_, lost), (again,) = router.requests
            assert lost.endswith(BODY)
            assert again.endswith(BODY)
        assert "was lost" not in caplog.text  # the router is no suspect

    run(work)


def test_request_that_cannot_be_sent_again_gets_a_new_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work() -> None:
        async with KeepingRouter(OK) as router:
            app = gateway(router)
            await ask(app)
            monkeypatch.setattr(held_request, "MAX_HELD_BODY_BYTES", 4)
            assert (await ask(app)).status == 200
            assert counts(router) == [1, 1]

    run(work)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(reply(b"{}", connection="close"), id="the router closes"),
        pytest.param(reply(b"{}", content_length=2, x=1), id="length is told twice"),
    ],
)
def test_connection_that_may_not_be_kept_is_closed(answer: Answer) -> None:
    async def work() -> None:
        async with KeepingRouter(answer) as router:
            await ask(gateway(router))
            await router.wait_until_ended(1)

    run(work)


def test_connection_after_a_response_without_body_is_closed() -> None:
    async def work() -> None:
        async with KeepingRouter(OK) as router:
            app = gateway(router)
            assert (await ask(app, Client(body=b"", method="HEAD"))).status == 200
            await router.wait_until_ended(1)
            assert b"connection: close" in router.requests[0][0]

    run(work)


def test_bytes_after_the_response_are_nobodys() -> None:
    async def work() -> None:
        async def answer(body: bytes, writer: asyncio.StreamWriter) -> None:
            response = b"HTTP/1.1 200 X\r\ncontent-length: 2\r\n\r\n{}"
            writer.write(response + b"HTTP/1.1 200 X\r\ncontent-length: 5\r\n\r\nother")
            await writer.drain()

        async with KeepingRouter(answer) as router:
            app = gateway(router)
            for _ in range(2):
                assert (await ask(app)).body == b"{}"
            assert counts(router) == [1, 1]

    run(work)


def test_client_that_hangs_up_ends_the_connection() -> None:
    async def work() -> None:
        client = Client()

        async def hang(_: bytes, writer: asyncio.StreamWriter) -> None:
            client.hang_up()
            await asyncio.Event().wait()

        async with KeepingRouter(hang, OK) as router:
            app = gateway(router)
            await ask(app, client)
            assert (await ask(app)).status == 200
            assert counts(router) == [1, 1]
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                if "_serve" in repr(task):
                    task.cancel()

    run(work)


def test_unused_and_old_connections_are_closed() -> None:
    async def work() -> None:
        async with KeepingRouter(OK) as router:
            await ask(gateway(router, idle_s=0.0))
            await router.wait_until_ended(1)
            app = gateway(router, max_age_s=0.0)
            for _ in range(2):
                await ask(app)
            await router.wait_until_ended(3)
            assert counts(router) == [1, 1, 1]

    run(work)


def test_no_more_than_the_bound_are_kept() -> None:
    async def work() -> None:
        both = asyncio.Barrier(2)

        async def answer(body: bytes, writer: asyncio.StreamWriter) -> None:
            await both.wait()
            await OK(body, writer)

        async with KeepingRouter(answer, answer, OK) as router:
            app = gateway(router, max_idle_per_router=1)
            await asyncio.gather(ask(app), ask(app))
            await router.wait_until_ended(1)
            await ask(app)
            assert sorted(counts(router)) == [1, 2]

    run(work)


def test_shutdown_closes_what_is_kept() -> None:
    async def work() -> None:
        async with KeepingRouter(OK) as router:
            app = gateway(router)
            await ask(app)
            await lifespan(app)
            await router.wait_until_ended(1)

    run(work)


def test_a_kept_connection_serves_only_who_it_was_verified_as(tmp_path: Path) -> None:
    async def work() -> None:
        async with KeepingRouter(OK) as router:
            pool = RouterPool()
            plain = RouterKey(router.address, None)
            await ask(GatewayApp(RouterAddress(router.address, "", 5.0), pool=pool))
            peer = tls_peer(tmp_path / "gateway", GATEWAY_NAME)
            assert pool._take(RouterKey(router.address, peer), has_body=True) is None
            kept = pool._take(plain, has_body=True)
            assert isinstance(kept, RouterConnection)
            kept.close()

    run(work)
