"""A gateway that leases tokens of limits from an authority, which may go away."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from faasmoe_contracts.gateway_file import BudgetEntry, LimitsEntry, TenantEntry
from faasmoe_contracts.lease_messages import LeaseAnswer, LeaseReport, PeriodUsage
from faasmoe_contracts.tenant_usage import Usage, day_of
from faasmoe_contracts.token_leases import LeaseAuthority
from faasmoe_gateway.accounts import Accounts
from faasmoe_gateway.lease_client import LeaseClient
from faasmoe_gateway.refusal import Refusal

TIMEOUT_S = 120.0
ACME = TenantEntry(
    "acme",
    "/keys",
    (),
    limits=LimitsEntry(requests=60),
    budgets=(BudgetEntry("outputTokens", "day", 100, 80),),
)


class Authority:
    """An authority of one limit.

    Attributes:
        reports: what it was asked.
        usage: what it tells of other gateways.
    """

    def __init__(self, path: Path) -> None:
        self.reports: list[LeaseReport] = []
        self.usage: dict[str, PeriodUsage] = {}
        self._path = path
        self._bucket = LeaseAuthority(60, time.monotonic())
        self._writers: list[asyncio.StreamWriter] = []

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        server = await asyncio.start_unix_server(self._serve, str(self._path))
        try:
            yield
        finally:
            server.close()
            self._path.unlink()
            for writer in self._writers:
                writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        while line := await reader.readline():
            report = LeaseReport.loads(line)
            self.reports.append(report)
            grants = {}
            for name, request in report.requests.items():
                grant = self._bucket.renew(report.holder, request, time.monotonic())
                assert grant is not None
                grants[name] = grant
            levels = dict.fromkeys(grants, self._bucket.available(time.monotonic()))
            writer.write(LeaseAnswer(grants, levels, self.usage).dumps())
        writer.close()


@asynccontextmanager
async def leasing(path: Path) -> AsyncIterator[tuple[Accounts, LeaseClient]]:
    accounts = Accounts([ACME], None, time.monotonic(), share=0.0)
    client = LeaseClient(path, "0", accounts, clock=time.monotonic, wall_clock=time.time)
    task = asyncio.create_task(client.run())
    try:
        async with asyncio.timeout(TIMEOUT_S):
            yield accounts, client
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="lc-") as folder:  # tmp_path may be too long
        yield Path(folder) / "leases.sock"


async def count_request(accounts: Accounts, client: LeaseClient) -> None:
    """Count a request once there is a lease; it is not there before the first renewal."""
    limiter = accounts.of("acme").limiter
    while True:
        try:
            limiter.count_request(time.monotonic())
        except Refusal:
            if not await client.renew():
                await asyncio.sleep(0.01)
        else:
            return


async def until_renewing(client: LeaseClient, *, expected: bool = True) -> None:
    while await client.renew() is not expected:  # noqa: ASYNC110  # it has no event
        await asyncio.sleep(0.01)


def test_tokens_come_with_a_renewal_that_is_asked_for(path: Path) -> None:
    async def work() -> None:
        authority = Authority(path)
        async with authority.listening(), leasing(path) as (accounts, client):
            await count_request(accounts, client)
            bucket = accounts.of("acme").limiter.buckets["requests"]
            assert bucket.share > 0.9  # the only gateway
            headers = accounts.of("acme").limiter.headers(time.monotonic())
            assert int(headers["x-ratelimit-remaining-requests"]) >= 58

    asyncio.run(work())


def test_without_the_authority_the_last_share_goes_on_and_leases_come_back(path: Path) -> None:
    async def work() -> None:
        async with leasing(path) as (accounts, client):
            assert not await client.renew()
            authority = Authority(path)
            async with authority.listening():
                await count_request(accounts, client)
            share = accounts.of("acme").limiter.buckets["requests"].share
            await until_renewing(client, expected=False)
            assert accounts.of("acme").limiter.buckets["requests"].share == share > 0
            async with authority.listening():
                await until_renewing(client)

    asyncio.run(work())


def test_usage_of_other_gateways_counts_for_budgets(path: Path) -> None:
    async def work() -> None:
        authority = Authority(path)
        used = Usage(1, 0, 95)
        authority.usage = {"acme": PeriodUsage(day_of(time.time()), used, used)}
        async with authority.listening(), leasing(path) as (accounts, client):
            account = accounts.of("acme")
            await until_renewing(client)
            assert "x-faasmoe-budget" in account.check_budgets(time.time())
            account.record(time.time(), "m", 0, 5)
            with pytest.raises(Refusal, match="Budget reached"):
                account.check_budgets(time.time())
            while not any(report.usage for report in authority.reports):
                await client.renew()
            told = [report.usage for report in authority.reports if report.usage][-1]
            assert told["acme"].in_day == Usage(1, 0, 5)

    asyncio.run(work())
