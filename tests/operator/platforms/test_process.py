"""The process platform with real processes: a zygote whose sandboxes need no torch."""

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
    ProcessPlatform,
    ProcessSandboxTemplate,
    Sandbox,
    SandboxEvent,
)
from faasmoe_operator.platforms.process import ProcessPlatformTiming
from faasmoe_operator.platforms.zygote import run_zygote, zygote_environment

FAKE_ZYGOTE = Path(__file__).parents[2] / "expert_fn" / "fake_zygote.py"
ENDS_AT_ONCE, NEVER_ANSWERS = 99, 98
DEADLINE_S = 20.0
TIMING = ProcessPlatformTiming(grace_s=0.3, probe_timeout_s=0.3, connect_timeout_s=DEADLINE_S)
STORE = ModelStore(Path("/store"), "sha256:0")


@pytest.fixture
def socket() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "zygote.sock"


@asynccontextmanager
async def zygote(socket: Path) -> AsyncIterator[Process]:
    command = (sys.executable, str(FAKE_ZYGOTE))
    async with (
        asyncio.timeout(DEADLINE_S),
        run_zygote(socket, token="secret", log=lambda _: None, command=command) as running,
    ):
        yield running


@asynccontextmanager
async def platform(socket: Path) -> AsyncIterator[ProcessPlatform]:
    async with zygote(socket), ProcessPlatform(socket=socket, timing=TIMING) as running:
        yield running


async def next_event(
    running: ProcessPlatform, wanted: Callable[[SandboxEvent], bool]
) -> SandboxEvent:
    async for event in running.watch():
        if wanted(event):
            return event
    raise AssertionError("the watch ended")


async def ready_sandbox(running: ProcessPlatform) -> Sandbox:
    created = await running.create(ProcessSandboxTemplate())
    event = await next_event(running, lambda e: e.sandbox.id == created.id and e.sandbox.ready)
    return event.sandbox


def is_running(pid: int | None) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


async def deletion_event(
    running: ProcessPlatform, sandbox: Sandbox, act: Awaitable[None]
) -> SandboxEvent:
    """Watch, act once the sandbox was seen, and return the event of its end."""
    watch = running.watch()
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
    async def story() -> None:
        async with platform(socket) as running:
            sandboxes = await asyncio.gather(*(ready_sandbox(running) for _ in range(4)))
            assert len({s.address for s in sandboxes}) == 4
            assert {s.template_hash for s in sandboxes} == {ProcessSandboxTemplate().digest}
            assert {s.id for s in await running.list()} == {s.id for s in sandboxes}

    asyncio.run(story())


def test_has_another_hash_for_another_template() -> None:
    assert ProcessSandboxTemplate().digest == ProcessSandboxTemplate().digest
    assert ProcessSandboxTemplate(threads=2).digest != ProcessSandboxTemplate().digest


def test_deletes_a_sandbox_and_forgets_it(socket: Path) -> None:
    async def story() -> None:
        async with platform(socket) as running:
            sandbox = await ready_sandbox(running)
            event = await deletion_event(running, sandbox, running.delete(sandbox.id))
            assert event.reason == "ended with status 0"
            assert await running.list() == ()
            assert not is_running(sandbox.pid)
            await running.delete(sandbox.id)

    asyncio.run(story())


def test_takes_a_sandbox_that_is_being_deleted_out_of_service_at_once(socket: Path) -> None:
    async def story() -> None:
        async with platform(socket) as running:
            sandbox = await ready_sandbox(running)
            await running.delete(sandbox.id)
            assert not any(s.ready for s in await running.list())

    asyncio.run(story())


def test_deletes_a_sandbox_that_does_not_listen(socket: Path) -> None:
    async def story() -> None:
        async with platform(socket) as running:
            sandbox = await running.create(ProcessSandboxTemplate(threads=NEVER_ANSWERS))
            await deletion_event(running, sandbox, running.delete(sandbox.id))
            assert not is_running(sandbox.pid)

    asyncio.run(story())


def test_tells_that_a_sandbox_was_killed(socket: Path) -> None:
    async def story() -> None:
        async with platform(socket) as running:
            sandbox = await ready_sandbox(running)
            event = await deletion_event(running, sandbox, kill(sandbox.pid))
            assert event.reason == "ended with status -9"

    asyncio.run(story())


def test_tells_what_went_with_a_zygote_and_works_with_the_next_one(socket: Path) -> None:
    async def story() -> None:
        async with (
            zygote(socket) as first,
            ProcessPlatform(socket=socket, timing=TIMING) as running,
        ):
            sandbox = await ready_sandbox(running)
            event = await deletion_event(running, sandbox, kill(first.pid))
            assert event.reason == f"the connection to zygote {first.pid} ended"
            async with zygote(socket):
                replacement = await ready_sandbox(running)
                assert replacement.id != sandbox.id
                assert [s.id for s in await running.list()] == [replacement.id]

    asyncio.run(story())


def test_reads_back_what_an_earlier_platform_left(socket: Path) -> None:
    template = ProcessSandboxTemplate(capacity=3, threads=2)

    async def story() -> None:
        async with zygote(socket):
            async with ProcessPlatform(socket=socket, timing=TIMING) as earlier:
                created = await earlier.create(template)
            assert is_running(created.pid)
            async with ProcessPlatform(socket=socket, timing=TIMING) as later:
                assert [s.id for s in await later.list()] == [created.id]
                ready = await next_event(later, lambda event: event.sandbox.ready)
                assert ready.sandbox == replace(created, ready=True)
                assert ready.sandbox.template_hash == template.digest
                event = await deletion_event(later, created, later.delete(created.id))
                assert event.reason == "ended with status 0"

    asyncio.run(story())


def test_leaves_nothing_behind_when_the_zygote_ends(socket: Path) -> None:
    async def story() -> list[int | None]:
        async with platform(socket) as running:
            sandboxes = [await ready_sandbox(running) for _ in range(2)]
            stubborn = await running.create(ProcessSandboxTemplate(threads=NEVER_ANSWERS))
            await running.delete(stubborn.id)
            return [stubborn.pid, *(s.pid for s in sandboxes)]

    assert not any(is_running(pid) for pid in asyncio.run(story()))


def test_says_that_no_zygote_answers(socket: Path) -> None:
    async def story() -> None:
        async with ProcessPlatform(
            socket=socket, timing=ProcessPlatformTiming(connect_timeout_s=0.2)
        ):
            raise AssertionError("connected to nothing")

    with pytest.raises(PlatformError, match=r"no zygote responded at \S+ for 0\.2 s"):
        asyncio.run(story())


def test_refuses_a_socket_whose_path_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(PlatformError, match="expected a path of at most 106 bytes"):
        zygote_environment(tmp_path / ("x" * 107), token="secret")


def test_says_that_a_sandbox_was_lost_before_it_was_ready(socket: Path) -> None:
    async def story() -> None:
        async with platform(socket) as running:
            sandbox = await running.create(ProcessSandboxTemplate(threads=ENDS_AT_ONCE))
            await wait_ready(running, [sandbox.id], timeout_s=DEADLINE_S)

    with pytest.raises(PlatformError, match="was lost before it was ready: "):
        asyncio.run(story())


def test_says_that_a_sandbox_was_lost_before_it_was_waited_for(socket: Path) -> None:
    async def story() -> None:
        async with platform(socket) as running:
            sandbox = await running.create(ProcessSandboxTemplate(threads=ENDS_AT_ONCE))
            events = running.watch()
            while await running.list():
                await anext(events)
            await wait_ready(running, [sandbox.id], timeout_s=DEADLINE_S)

    with pytest.raises(PlatformError, match="was lost before it was ready: it had already exited"):
        asyncio.run(story())


def test_says_that_sandboxes_were_not_ready_in_time(socket: Path) -> None:
    async def story() -> None:
        async with platform(socket) as running:
            sandbox = await running.create(ProcessSandboxTemplate(threads=NEVER_ANSWERS))
            await wait_ready(running, [sandbox.id], timeout_s=0.2)

    with pytest.raises(PlatformError, match=r"1 of 1 sandboxes were not ready after 0\.2 s"):
        asyncio.run(story())


def test_makes_every_function_resident(socket: Path) -> None:
    functions = [FunctionSpec(f"f{index}", (index,), (0, 1)) for index in range(5)]

    async def story() -> None:
        async with platform(socket) as running, SandboxClient(token="secret") as client:
            residents = await place_all_functions(
                functions,
                running,
                client,
                template=ProcessSandboxTemplate(capacity=2),
                store=STORE,
                progress=lambda _: None,
            )
            table = residents.routing_table("sha256:0")
            assert [entry.spec for entry in table.functions] == functions
            for sandbox, group in residents.sandboxes:
                held = (await client.list(sandbox.address)).functions
                assert {f.spec for f in held} == set(group)
                assert {f.model_digest for f in held} == {"sha256:0"}

    asyncio.run(story())


def test_says_that_a_sandbox_refused(socket: Path) -> None:
    async def story() -> None:
        async with platform(socket) as running, SandboxClient(token="wrong") as client:
            sandbox = await ready_sandbox(running)
            await client.attach(sandbox.address, FunctionSpec("f", (0,), (0,)), store=STORE)

    with pytest.raises(SandboxClientError, match="authorization: expected the token") as caught:
        asyncio.run(story())
    assert (caught.value.code, caught.value.status) == ("unauthorized", 401)
