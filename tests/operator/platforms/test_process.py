"""The process platform with real processes: sandboxes of a fake zygote, which need no torch."""

import asyncio
import os
import signal
import sys
import tempfile
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_operator.control.sandbox_client import ModelStore, SandboxClient, SandboxClientError
from faasmoe_operator.control.static_placement import place_all_functions, wait_ready
from faasmoe_operator.errors import PlatformError
from faasmoe_operator.platforms import (
    ProcessSandboxTemplate,
    Sandbox,
    SandboxEvent,
)
from faasmoe_operator.platforms.process import ProcessPlatform, ProcessPlatformTiming
from faasmoe_operator.platforms.zygote import run_zygote, zygote_environment

FAKE_ZYGOTE = Path(__file__).parents[2] / "expert_fn" / "fake_zygote.py"
EXITS_IMMEDIATELY, UNRESPONSIVE = 99, 98
DEADLINE_S = 120.0
TIMING = ProcessPlatformTiming(
    grace_s=DEADLINE_S, probe_timeout_s=0.3, connect_timeout_s=DEADLINE_S
)
HASTY = replace(TIMING, grace_s=0.3)  # for sandboxes that do not end on SIGTERM
STORE = ModelStore(Path("/store"), "sha256:0")


@pytest.fixture
def socket() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "zygote.sock"


@asynccontextmanager
async def running_zygote(socket: Path) -> AsyncIterator[Process]:
    command = (sys.executable, str(FAKE_ZYGOTE))
    async with (
        asyncio.timeout(DEADLINE_S),
        run_zygote(socket, token="secret", log=lambda _: None, command=command) as process,
    ):
        yield process


@asynccontextmanager
async def process_platform(
    socket: Path, timing: ProcessPlatformTiming = TIMING
) -> AsyncIterator[ProcessPlatform]:
    async with running_zygote(socket), ProcessPlatform(socket=socket, timing=timing) as platform:
        yield platform


async def next_event(
    platform: ProcessPlatform, predicate: Callable[[SandboxEvent], bool]
) -> SandboxEvent:
    async for event in platform.watch():
        if predicate(event):
            return event
    raise AssertionError("the watch ended")


async def ready_sandbox(platform: ProcessPlatform) -> Sandbox:
    created = await platform.create(ProcessSandboxTemplate())
    event = await next_event(platform, lambda e: e.sandbox.id == created.id and e.sandbox.ready)
    return event.sandbox


def is_running(pid: int | None) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


async def deletion_event(
    platform: ProcessPlatform, sandbox: Sandbox, act: Awaitable[None]
) -> SandboxEvent:
    """Watch, act once the sandbox was seen, and return the event of its deletion."""
    watch = platform.watch()
    async for event in watch:
        if event.sandbox.id == sandbox.id:
            break
    await act
    async for event in watch:
        if event.sandbox.id == sandbox.id and event.kind == "deleted":
            return event
    raise AssertionError("the watch ended")


async def kill(pid: int | None) -> None:
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def test_creates_sandboxes_that_become_ready(socket: Path) -> None:
    async def scenario() -> None:
        async with process_platform(socket) as platform:
            sandboxes = await asyncio.gather(*(ready_sandbox(platform) for _ in range(4)))
            assert len({s.address for s in sandboxes}) == 4
            assert {s.template_hash for s in sandboxes} == {ProcessSandboxTemplate().digest}
            assert {s.id for s in await platform.list()} == {s.id for s in sandboxes}

    asyncio.run(scenario())


def test_template_digest_depends_on_every_setting() -> None:
    assert ProcessSandboxTemplate().digest == ProcessSandboxTemplate().digest
    assert ProcessSandboxTemplate(threads=2).digest != ProcessSandboxTemplate().digest


def test_deletes_a_sandbox(socket: Path) -> None:
    async def scenario() -> None:
        async with process_platform(socket) as platform:
            sandbox = await ready_sandbox(platform)
            event = await deletion_event(platform, sandbox, platform.delete(sandbox.id))
            assert event.reason == "exited with status 0"
            assert await platform.list() == ()
            assert not is_running(sandbox.pid)
            await platform.delete(sandbox.id)

    asyncio.run(scenario())


def test_deleted_sandbox_is_not_ready_immediately(socket: Path) -> None:
    async def scenario() -> None:
        async with process_platform(socket) as platform:
            sandbox = await ready_sandbox(platform)
            await platform.delete(sandbox.id)
            assert not any(s.ready for s in await platform.list())

    asyncio.run(scenario())


def test_kills_an_unresponsive_sandbox_after_the_grace_period(socket: Path) -> None:
    async def scenario() -> None:
        async with process_platform(socket, HASTY) as platform:
            sandbox = await platform.create(ProcessSandboxTemplate(threads=UNRESPONSIVE))
            await deletion_event(platform, sandbox, platform.delete(sandbox.id))
            assert not is_running(sandbox.pid)

    asyncio.run(scenario())


def test_reports_the_exit_status_of_a_killed_sandbox(socket: Path) -> None:
    async def scenario() -> None:
        async with process_platform(socket) as platform:
            sandbox = await ready_sandbox(platform)
            event = await deletion_event(platform, sandbox, kill(sandbox.pid))
            assert event.reason == "exited with status -9"

    asyncio.run(scenario())


def test_reports_sandboxes_lost_with_their_zygote_and_reconnects_to_the_next(socket: Path) -> None:
    async def scenario() -> None:
        async with (
            running_zygote(socket) as first,
            ProcessPlatform(socket=socket, timing=TIMING) as platform,
        ):
            sandbox = await ready_sandbox(platform)
            event = await deletion_event(platform, sandbox, kill(first.pid))
            assert event.reason == f"the connection to zygote {first.pid} ended"
            async with running_zygote(socket):
                replacement = await ready_sandbox(platform)
                assert replacement.id != sandbox.id
                assert [s.id for s in await platform.list()] == [replacement.id]

    asyncio.run(scenario())


def test_lists_sandboxes_that_an_earlier_platform_created(socket: Path) -> None:
    template = ProcessSandboxTemplate(capacity=3, threads=2)

    async def scenario() -> None:
        async with running_zygote(socket):
            async with ProcessPlatform(socket=socket, timing=TIMING) as earlier:
                created = await earlier.create(template)
            assert is_running(created.pid)
            async with ProcessPlatform(socket=socket, timing=TIMING) as later:
                assert [s.id for s in await later.list()] == [created.id]
                ready = await next_event(later, lambda event: event.sandbox.ready)
                assert ready.sandbox == replace(created, ready=True)
                assert ready.sandbox.template_hash == template.digest
                event = await deletion_event(later, created, later.delete(created.id))
                assert event.reason == "exited with status 0"

    asyncio.run(scenario())


def test_no_process_survives_the_zygote(socket: Path) -> None:
    async def scenario() -> list[int | None]:
        async with process_platform(socket, HASTY) as platform:
            sandboxes = [await ready_sandbox(platform) for _ in range(2)]
            stubborn = await platform.create(ProcessSandboxTemplate(threads=UNRESPONSIVE))
            await platform.delete(stubborn.id)
            return [stubborn.pid, *(s.pid for s in sandboxes)]

    assert not any(is_running(pid) for pid in asyncio.run(scenario()))


def test_raises_when_no_zygote_responds(socket: Path) -> None:
    async def scenario() -> None:
        async with ProcessPlatform(
            socket=socket, timing=ProcessPlatformTiming(connect_timeout_s=0.2)
        ):
            raise AssertionError("connected to nothing")

    with pytest.raises(PlatformError, match=r"no zygote responded at \S+ for 0\.2 s"):
        asyncio.run(scenario())


def test_rejects_a_socket_path_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match="expected a path of at most 106 bytes"):
        zygote_environment(tmp_path / ("x" * 107), token="secret")


def test_wait_ready_raises_when_a_sandbox_is_lost(socket: Path) -> None:
    async def scenario() -> None:
        async with process_platform(socket) as platform:
            sandbox = await platform.create(ProcessSandboxTemplate(threads=EXITS_IMMEDIATELY))
            await wait_ready(platform, [sandbox.id], timeout_s=DEADLINE_S)

    with pytest.raises(PlatformError, match="was lost before it was ready: "):
        asyncio.run(scenario())


def test_wait_ready_raises_when_a_sandbox_was_lost_before_the_call(socket: Path) -> None:
    async def scenario() -> None:
        async with process_platform(socket) as platform:
            sandbox = await platform.create(ProcessSandboxTemplate(threads=EXITS_IMMEDIATELY))
            events = platform.watch()
            while await platform.list():
                await anext(events)
            await wait_ready(platform, [sandbox.id], timeout_s=DEADLINE_S)

    with pytest.raises(PlatformError, match="was lost before it was ready: it had already exited"):
        asyncio.run(scenario())


def test_wait_ready_raises_after_the_timeout(socket: Path) -> None:
    async def scenario() -> None:
        async with process_platform(socket) as platform:
            sandbox = await platform.create(ProcessSandboxTemplate(threads=UNRESPONSIVE))
            await wait_ready(platform, [sandbox.id], timeout_s=0.2)

    with pytest.raises(PlatformError, match=r"1 of 1 sandboxes were not ready after 0\.2 s"):
        asyncio.run(scenario())


def test_static_placement_attaches_every_function(socket: Path) -> None:
    functions = [FunctionSpec(f"f{index}", (index,), (0, 1)) for index in range(5)]

    async def scenario() -> None:
        async with process_platform(socket) as platform, SandboxClient(token="secret") as client:
            placement = await place_all_functions(
                functions,
                platform,
                client,
                template=ProcessSandboxTemplate(capacity=2),
                store=STORE,
                progress=lambda _: None,
            )
            table = placement.routing_table("sha256:0")
            assert [entry.spec for entry in table.functions] == functions
            for sandbox, group in placement.sandboxes:
                attached = (await client.list(sandbox.address)).functions
                assert {f.spec for f in attached} == set(group)
                assert {f.model_digest for f in attached} == {"sha256:0"}

    asyncio.run(scenario())


def test_client_raises_when_a_sandbox_rejects_the_token(socket: Path) -> None:
    async def scenario() -> None:
        async with process_platform(socket) as platform, SandboxClient(token="wrong") as client:
            sandbox = await ready_sandbox(platform)
            await client.attach(sandbox.address, FunctionSpec("f", (0,), (0,)), store=STORE)

    with pytest.raises(SandboxClientError, match="authorization: expected the token") as caught:
        asyncio.run(scenario())
    assert (caught.value.code, caught.value.status) == ("unauthorized", 401)
