"""What watchers of a sandbox registry receive, and when."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

from faasmoe_operator.platforms.base import Sandbox, SandboxEvent
from faasmoe_operator.platforms.registry import SandboxRegistry

DEADLINE_S = 120.0
ONE, TWO = (Sandbox(name, f"127.0.0.1:{port}", False, "") for name, port in (("a", 1), ("b", 2)))


async def next_events(events: AsyncIterator[SandboxEvent], n: int) -> list[SandboxEvent]:
    async with asyncio.timeout(DEADLINE_S):
        return [await anext(events) for _ in range(n)]


def test_watch_yields_existing_sandboxes_then_changes() -> None:
    async def scenario() -> None:
        registry, ready = SandboxRegistry(), replace(ONE, ready=True)
        registry.upsert(ONE)
        events = registry.watch()
        assert await next_events(events, 1) == [SandboxEvent("changed", ONE)]
        registry.upsert(ready)
        registry.upsert(TWO)
        assert await next_events(events, 2) == [
            SandboxEvent("changed", ready),
            SandboxEvent("changed", TWO),
        ]
        registry.remove("a", reason="exited with status 3")
        assert await next_events(events, 1) == [
            SandboxEvent("deleted", ready, "exited with status 3")
        ]

    asyncio.run(scenario())


def test_watch_yields_a_sandbox_deleted_before_the_first_step() -> None:
    async def scenario() -> None:
        registry = SandboxRegistry()
        registry.upsert(ONE)
        events = registry.watch()
        registry.remove("a", reason="exited with status 3")
        assert await next_events(events, 1) == [
            SandboxEvent("deleted", ONE, "exited with status 3")
        ]

    asyncio.run(scenario())


def test_watch_waits_for_the_next_change() -> None:
    async def scenario() -> None:
        registry = SandboxRegistry()
        waiting = asyncio.create_task(next_events(registry.watch(), 1))
        await asyncio.sleep(0)
        assert not waiting.done()
        registry.upsert(TWO)
        assert await waiting == [SandboxEvent("changed", TWO)]

    asyncio.run(scenario())


def test_watch_skips_intermediate_states_but_not_the_last() -> None:
    async def scenario() -> None:
        registry, ready = SandboxRegistry(), replace(ONE, ready=True)
        registry.upsert(ONE)
        events = registry.watch()
        await next_events(events, 1)
        registry.upsert(ready)
        registry.upsert(ONE)
        registry.upsert(ready)
        registry.upsert(TWO)
        assert await next_events(events, 2) == [
            SandboxEvent("changed", ready),
            SandboxEvent("changed", TWO),
        ]

    asyncio.run(scenario())
