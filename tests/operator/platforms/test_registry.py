"""What those who watch a platform's sandboxes are told, and when."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

from faasmoe_operator.platforms.base import Sandbox, SandboxEvent
from faasmoe_operator.platforms.registry import SandboxRegistry

DEADLINE_S = 5
ONE, TWO = (Sandbox(name, f"127.0.0.1:{port}", False, "") for name, port in (("a", 1), ("b", 2)))


async def next_events(events: AsyncIterator[SandboxEvent], n: int) -> list[SandboxEvent]:
    async with asyncio.timeout(DEADLINE_S):
        return [await anext(events) for _ in range(n)]


def test_tells_what_is_there_then_what_changes() -> None:
    async def story() -> None:
        roster, ready = SandboxRegistry(), replace(ONE, ready=True)
        roster.upsert(ONE)
        events = roster.watch()
        assert await next_events(events, 1) == [SandboxEvent("changed", ONE)]
        roster.upsert(ready)
        roster.upsert(TWO)
        assert await next_events(events, 2) == [
            SandboxEvent("changed", ready),
            SandboxEvent("changed", TWO),
        ]
        roster.remove("a", reason="ended with status 3")
        assert await next_events(events, 1) == [
            SandboxEvent("deleted", ready, "ended with status 3")
        ]

    asyncio.run(story())


def test_tells_of_one_that_went_between_the_call_and_the_first_step() -> None:
    async def story() -> None:
        roster = SandboxRegistry()
        roster.upsert(ONE)
        events = roster.watch()
        roster.remove("a", reason="ended with status 3")
        assert await next_events(events, 1) == [SandboxEvent("deleted", ONE, "ended with status 3")]

    asyncio.run(story())


def test_wakes_who_waits_when_one_comes() -> None:
    async def story() -> None:
        roster = SandboxRegistry()
        waiting = asyncio.create_task(next_events(roster.watch(), 1))
        await asyncio.sleep(0)
        assert not waiting.done()
        roster.upsert(TWO)
        assert await waiting == [SandboxEvent("changed", TWO)]

    asyncio.run(story())


def test_leaves_out_states_between_two_steps_but_never_the_last() -> None:
    async def story() -> None:
        roster, ready = SandboxRegistry(), replace(ONE, ready=True)
        roster.upsert(ONE)
        events = roster.watch()
        await next_events(events, 1)
        roster.upsert(ready)
        roster.upsert(ONE)
        roster.upsert(ready)
        roster.upsert(TWO)
        assert await next_events(events, 2) == [
            SandboxEvent("changed", ready),
            SandboxEvent("changed", TWO),
        ]

    asyncio.run(story())
