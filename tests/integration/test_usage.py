"""One account over several routers and a control process, all of which come and go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from aiohttp import web
from boxes import TOKEN, model_of, world

from faasmoe_operator.control.api import make_app
from faasmoe_operator.control.ledger_file import LedgerFile
from faasmoe_router.control.client import ControlClient
from faasmoe_router.control.teller import UsageTeller
from faasmoe_router.tenants.books import Books
from faasmoe_router.tenants.costs import Cost
from faasmoe_router.tenants.usage import Accounts
from faasmoe_router.tenants.usage_file import UsageFile


class Router:
    """What of a router keeps accounts."""

    def __init__(self, url: str, file: UsageFile | None = None) -> None:
        self.accounts = Accounts(1000.0) if file is None else file.load()
        self.books = Books(self.accounts, file)
        self.clients: list[ControlClient] = []
        self.follow(url)

    def follow(self, url: str) -> None:
        """Tell this control process from now on."""
        self.clients.append(ControlClient(url, token=TOKEN))
        self.teller = UsageTeller(self.clients[-1], self.books, n_routers=lambda: 2)

    async def close(self) -> None:
        """Close its connections."""
        for client in self.clients:
            await client.close()

    def serve(self, tenant: str, n_tokens: int) -> None:
        """Count a request."""
        account = self.accounts.of(tenant)
        account.generated_tokens += n_tokens
        account.requests["completed"] += 1
        account.cost += Cost(n_tokens / 4, n_tokens / 8)

    def used(self, tenant: str) -> tuple[float, float, float]:
        """Return a tenant's tokens, requests and cost, as this router tells them."""
        whole = self.books.whole(tenant)
        return whole["generated_tokens"], whole["completed"], whole["expert_gb_seconds"]


@asynccontextmanager
async def control(path: Path) -> AsyncIterator[str]:
    """Run a control API whose accounts are in a file, read at its start and written at its end."""
    file = LedgerFile(path)
    async with world(model_of(1)) as (controller, _):
        controller.ledger = file.read()
        runner = web.AppRunner(make_app(controller, token=TOKEN), shutdown_timeout=0.5)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()
            assert await file.write(controller.ledger)


async def tell_all(*routers: Router) -> None:
    """Tell and hear, as often as it takes for each to hear of what all others told."""
    for _ in range(2):
        for router in routers:
            await router.teller.tell()


def test_every_router_tells_the_same_sum_whoever_was_replaced_meanwhile(tmp_path: Path) -> None:
    async def story() -> None:
        ledger = tmp_path / "accounts.json"
        async with control(ledger) as url, AsyncExitStack() as stack:
            one, two, three = (Router(url) for _ in range(3))
            for router in (one, two, three):
                stack.push_async_callback(router.close)
            one.serve("acme", 8)
            two.serve("acme", 16)
            two.serve("beta", 4)
            await tell_all(one, two)
            assert one.used("acme") == two.used("acme") == (24, 2, 3.0)
            assert one.used("beta") == (4, 1, 0.5)
            two.serve("acme", 8)
            assert two.used("acme") == (32, 3, 4.0)  # its own at once
            await two.teller.end()  # its pod is replaced
            await tell_all(one, three)
            assert one.used("acme") == three.used("acme") == (32, 3, 4.0)

    asyncio.run(story())


def test_the_sum_outlives_the_control_process(tmp_path: Path) -> None:
    async def story() -> None:
        ledger = tmp_path / "accounts.json"
        async with AsyncExitStack() as stack:
            async with control(ledger) as url:
                one, two = Router(url), Router(url)
                stack.push_async_callback(one.close)
                two.serve("beta", 4)
                one.serve("acme", 8)
                await tell_all(one, two)
                await two.close()
            one.serve("acme", 8)
            await one.teller.tell()  # nobody hears
            assert one.used("acme") == (16, 2, 2.0)
            async with control(ledger) as url:
                one.follow(url)
                three = Router(url)
                stack.push_async_callback(three.close)
                await tell_all(one, three)
                assert one.used("acme") == three.used("acme") == (16, 2, 2.0)
                assert three.used("beta") == (4, 1, 0.5)

    asyncio.run(story())


def test_a_router_that_keeps_its_book_is_not_counted_twice(tmp_path: Path) -> None:
    async def story() -> None:
        async with control(tmp_path / "accounts.json") as url, AsyncExitStack() as stack:
            before = Router(url, UsageFile(tmp_path / "router"))
            stack.push_async_callback(before.close)
            before.serve("acme", 8)
            await before.teller.tell()
            before.serve("acme", 8)
            await before.teller.tell()  # killed after this: its file has what it has told
            after = Router(url, UsageFile(tmp_path / "router"))
            stack.push_async_callback(after.close)
            assert after.books.name == before.books.name
            after.serve("acme", 8)
            await after.teller.tell()
            assert after.used("acme") == (24, 3, 3.0)

    asyncio.run(story())
