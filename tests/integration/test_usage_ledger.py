"""Usage over several routers and a control process, all of which restart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from aiohttp import web
from fake_platform import TOKEN, controller_and_platform, make_model

from faasmoe_operator.control.api import make_model_app
from faasmoe_operator.control.state_files import FileUsageStore
from faasmoe_router.control.client import ControlClient
from faasmoe_router.control.usage_reporter import UsageReporter
from faasmoe_router.tenants.usage import FunctionCost, RouterUsage
from faasmoe_router.tenants.usage_store import ClusterUsage, UsageFileStore


class ReportingRouter:
    """The usage accounting of one router."""

    def __init__(self, url: str, store: UsageFileStore | None = None) -> None:
        self.usage = RouterUsage(1000.0) if store is None else store.load()
        self.cluster_usage = ClusterUsage(self.usage, store)
        self.clients: list[ControlClient] = []
        self.connect(url)

    def connect(self, url: str) -> None:
        """Report to this control process from now on."""
        self.clients.append(ControlClient(url, token=TOKEN))
        self.reporter = UsageReporter(self.clients[-1], self.cluster_usage, n_routers=lambda: 2)

    async def close(self) -> None:
        """Close the connections."""
        for client in self.clients:
            await client.close()

    def record_request(self, tenant: str, n_tokens: int) -> None:
        """Count a request."""
        usage = self.usage.for_tenant(tenant)
        usage.generated_tokens += n_tokens
        usage.requests["completed"] += 1
        usage.cost += FunctionCost(n_tokens / 4, n_tokens / 8)

    def reported_usage(self, tenant: str) -> tuple[float, float, float]:
        """Return tokens, requests and cost of a tenant over all routers, as known here."""
        total = self.cluster_usage.cluster_total(tenant)
        return total.generated_tokens, total.completed, total.expert_gb_seconds


@asynccontextmanager
async def running_control(path: Path) -> AsyncIterator[str]:
    """Run a control API that reads its ledger from a file and writes it at the end."""
    store = FileUsageStore(path)
    async with controller_and_platform(make_model(1)) as (controller, _):
        controller.usage_ledger = store.read()
        runner = web.AppRunner(make_model_app(controller, token=TOKEN), shutdown_timeout=0.5)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()
            assert await store.write(controller.usage_ledger)


async def report_all(*routers: ReportingRouter) -> None:
    """Report twice, so that each router gets what all others have reported."""
    for _ in range(2):
        for router in routers:
            await router.reporter.report()


def test_all_routers_agree_on_the_usage_after_one_was_replaced(tmp_path: Path) -> None:
    async def scenario() -> None:
        ledger_path = tmp_path / "accounts.json"
        async with running_control(ledger_path) as url, AsyncExitStack() as stack:
            one, two, three = (ReportingRouter(url) for _ in range(3))
            for router in (one, two, three):
                stack.push_async_callback(router.close)
            one.record_request("acme", 8)
            two.record_request("acme", 16)
            two.record_request("beta", 4)
            await report_all(one, two)
            assert one.reported_usage("acme") == two.reported_usage("acme") == (24, 2, 3.0)
            assert one.reported_usage("beta") == (4, 1, 0.5)
            two.record_request("acme", 8)
            assert two.reported_usage("acme") == (32, 3, 4.0)  # its own usage counts immediately
            await two.reporter.report_final()  # its pod is replaced
            await report_all(one, three)
            assert one.reported_usage("acme") == three.reported_usage("acme") == (32, 3, 4.0)

    asyncio.run(scenario())


def test_usage_survives_a_restart_of_the_control_process(tmp_path: Path) -> None:
    async def scenario() -> None:
        ledger_path = tmp_path / "accounts.json"
        async with AsyncExitStack() as stack:
            async with running_control(ledger_path) as url:
                one, two = ReportingRouter(url), ReportingRouter(url)
                stack.push_async_callback(one.close)
                two.record_request("beta", 4)
                one.record_request("acme", 8)
                await report_all(one, two)
                await two.close()
            one.record_request("acme", 8)
            await one.reporter.report()  # no control process is running
            assert one.reported_usage("acme") == (16, 2, 2.0)
            async with running_control(ledger_path) as url:
                one.connect(url)
                three = ReportingRouter(url)
                stack.push_async_callback(three.close)
                await report_all(one, three)
                assert one.reported_usage("acme") == three.reported_usage("acme") == (16, 2, 2.0)
                assert three.reported_usage("beta") == (4, 1, 0.5)

    asyncio.run(scenario())


def test_a_router_that_restarts_with_its_state_is_not_counted_twice(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running_control(tmp_path / "accounts.json") as url, AsyncExitStack() as stack:
            before = ReportingRouter(url, UsageFileStore(tmp_path / "router"))
            stack.push_async_callback(before.close)
            before.record_request("acme", 8)
            await before.reporter.report()
            before.record_request("acme", 8)
            await (
                before.reporter.report()
            )  # killed after this: its file contains what it has reported
            after = ReportingRouter(url, UsageFileStore(tmp_path / "router"))
            stack.push_async_callback(after.close)
            assert after.cluster_usage.source_id == before.cluster_usage.source_id
            after.record_request("acme", 8)
            await after.reporter.report()
            assert after.reported_usage("acme") == (24, 3, 3.0)

    asyncio.run(scenario())
