"""What the gateway tells whoever starts routers."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from faasmoe_contracts.json_reader import ContractError
from faasmoe_contracts.router_demand import RouterDemand, RunningRouters
from faasmoe_gateway import demand_reporter
from faasmoe_gateway.control_link import ControlLink
from faasmoe_gateway.demand_reporter import DemandReporter


@pytest.fixture
def path() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dr-") as folder:  # tmp_path may be too long
        yield Path(folder) / "demand.sock"


@asynccontextmanager
async def listening(path: Path) -> AsyncIterator[asyncio.Queue[RouterDemand]]:
    reports: asyncio.Queue[RouterDemand] = asyncio.Queue()

    writers: list[asyncio.StreamWriter] = []

    async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        while line := await reader.readline():
            reports.put_nowait(RouterDemand.loads(line))
        writer.close()

    server = await asyncio.start_unix_server(read, str(path))
    try:
        yield reports
    finally:
        server.close()
        os.unlink(path)  # so that nobody connects meanwhile
        for writer in writers:
            writer.close()
            await writer.wait_closed()


@asynccontextmanager
async def reporting(path: Path) -> AsyncIterator[DemandReporter]:
    reporter = DemandReporter(ControlLink.to_socket(path))
    task = asyncio.create_task(reporter.run())
    try:
        yield reporter
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(reports: asyncio.Queue[RouterDemand], expected: dict[str, int]) -> None:
    async with asyncio.timeout(120):
        while (await reports.get()).models != expected:
            pass


def test_first_request_of_a_model_is_told_at_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demand_reporter, "REPORT_INTERVAL_S", 1e6)

    async def work() -> None:
        async with listening(path) as reports, reporting(path) as reporter:
            await until(reports, {})
            with reporter.request("a"), reporter.request("a"):
                await until(reports, {"a": 2})
                with reporter.request("b"):
                    await until(reports, {"a": 2, "b": 1})

    asyncio.run(work())


def test_end_of_requests_is_told_and_the_other_side_may_come_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demand_reporter, "REPORT_INTERVAL_S", 0.01)

    async def work() -> None:
        async with reporting(path) as reporter:
            with reporter.request("a"):
                async with listening(path) as reports:
                    await until(reports, {"a": 1})
            async with listening(path) as reports:
                await until(reports, {"a": 0})

    asyncio.run(work())


def test_end_of_the_last_request_is_told_at_once_unless_another_follows(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demand_reporter, "REPORT_INTERVAL_S", 1e6)
    monkeypatch.setattr(demand_reporter, "UNUSED_AFTER_S", 0.0)

    async def work() -> None:
        async with listening(path) as reports, reporting(path) as reporter:
            await until(reports, {})
            with reporter.request("a"):
                await until(reports, {"a": 1})
            with reporter.request("a"):  # before the loop runs
                await until(reports, {"a": 1})
            await until(reports, {"a": 0})
            assert reports.empty()

    asyncio.run(work())


def test_last_request_of_a_router_that_takes_no_more_is_told_at_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demand_reporter, "REPORT_INTERVAL_S", 1e6)

    async def work() -> None:
        async with listening(path) as reports, reporting(path) as reporter:
            with reporter.request("a"):
                with reporter.sent("a", "0"):
                    await until(reports, {"a": 1})
                async with asyncio.timeout(120):
                    assert (await reports.get()).routers == {"a": {"0": 0}}

    asyncio.run(work())


def test_running_routers_are_followed_and_confirmed(path: Path) -> None:
    async def work() -> None:
        reports: asyncio.Queue[RouterDemand] = asyncio.Queue()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(RunningRouters(7, {"a": ("0", "1")}).dumps())
            while line := await reader.readline():
                reports.put_nowait(RouterDemand.loads(line))
            writer.close()

        server = await asyncio.start_unix_server(serve, str(path))
        told: list[Mapping[str, tuple[str, ...]]] = []
        reporter = DemandReporter(ControlLink.to_socket(path))
        reporter.on_routers = told.append
        task = asyncio.create_task(reporter.run())
        with reporter.sent("a", "1"):
            async with asyncio.timeout(120):
                while (report := await reports.get()).seen != 7:
                    pass
            assert report.routers == {"a": {"1": 1}}
        assert told == [{"a": ("0", "1")}]
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        server.close()

    asyncio.run(work())


@pytest.mark.parametrize(
    "line",
    [
        b"x\n",
        b"[]\n",
        b'{"models": {"a": -1}, "routers": {}, "seen": 0}\n',
        b'{"models": {"a": "1"}, "routers": {}, "seen": 0}\n',
        b'{"models": {}, "routers": {"a": {"0": -1}}, "seen": 0}\n',
        b'{"models": {}, "routers": {}, "seen": -1}\n',
        b'{"models": [], "routers": {}, "seen": 0}\n',
    ],
)
def test_other_lines_are_refused(line: bytes) -> None:
    with pytest.raises(ContractError):
        RouterDemand.loads(line)


@pytest.mark.parametrize(
    "line",
    [b'{"version": 1, "routers": {"a": "0"}}', b'{"version": 1, "routers": {"a": [0]}}', b"{}"],
)
def test_other_lists_of_routers_are_refused(line: bytes) -> None:
    with pytest.raises(ContractError):
        RunningRouters.loads(line)
