"""Preparations take turns between tenants, and those whose client has left cost nothing more."""

import asyncio
import threading
from collections.abc import Callable, Hashable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_router.api.fair_slots import FairSlots
from faasmoe_router.api.preparation import INLINE_BYTES, HeldBytes, PreparationQueue, held_bytes
from faasmoe_router.errors import TenantQueueFull
from faasmoe_router.tenants.service import Caller

DEADLINE_S = 120.0
LARGE = INLINE_BYTES + 1
FLOOD, QUIET = Caller("flood"), Caller("quiet")


def serve(slots: FairSlots, n: int, *, seconds: float = 1.0) -> list[object]:
    """Serve the next `n` entries, one after the other; return them."""
    served = []
    for _ in range(n):
        started = slots.pop()
        assert started is not None
        served.append(started[1])
        slots.release(started[0], seconds)
    return served


def test_a_tenant_that_arrives_late_is_next() -> None:
    slots = FairSlots(n_slots=1, max_waiting=100)
    for index in range(20):
        slots.push("flood", index)
    serve(slots, 5)
    slots.push("quiet", "q")
    assert "q" in serve(slots, 2)


def test_service_follows_the_weights() -> None:
    slots = FairSlots(n_slots=1, max_waiting=1000)
    for index in range(60):
        slots.push("heavy", ("heavy", index), weight=2)
        slots.push("light", ("light", index), weight=1)
    served = [str(entry) for entry in serve(slots, 60)]
    assert abs(sum("heavy" in entry for entry in served) - 40) <= 1


def test_idleness_earns_no_credit() -> None:
    slots = FairSlots(n_slots=1, max_waiting=100)
    slots.push("late", "first")
    serve(slots, 1)
    for index in range(30):
        slots.push("busy", index)
    serve(slots, 20)
    for index in range(10):
        slots.push("late", f"l{index}")
    assert 4 <= sum(isinstance(entry, str) for entry in serve(slots, 10)) <= 6


def test_no_tenant_holds_every_slot_of_a_shared_queue() -> None:
    slots = FairSlots(n_slots=2, max_waiting=100, is_shared=True)
    slots.push("flood", "a")
    slots.push("flood", "b")
    assert slots.pop() == ("flood", "a")
    assert slots.pop() is None
    slots.push("quiet", "q")
    assert slots.pop() == ("quiet", "q")


def test_a_full_part_rejects_only_its_own_tenant() -> None:
    slots = FairSlots(n_slots=1, max_waiting=10)
    slots.push("quiet", 0)
    for index in range(5):
        slots.push("flood", index)
    with pytest.raises(TenantQueueFull, match="5 of your requests"):
        slots.push("flood", 5)
    slots.push("quiet", 1)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.01, 9.0)), max_size=60))
def test_every_entry_is_served_once(entries: list[tuple[str, float]]) -> None:
    slots = FairSlots(n_slots=2, max_waiting=1000)
    for index, (tenant, _) in enumerate(entries):
        slots.push(tenant, index)
    elapsed_s: dict[Hashable, float] = {i: seconds for i, (_, seconds) in enumerate(entries)}
    served = []
    while (started := slots.pop()) is not None:
        tenant, entry = started
        served.append(entry)
        slots.release(tenant, elapsed_s[entry])
    assert len(served) == len(entries)
    assert set(served) == set(range(len(entries)))


def test_an_abandoned_preparation_never_starts() -> None:
    blocker, started = threading.Event(), []

    def record(name: str) -> Callable[[], None]:
        return lambda: started.append(name)

    async def scenario() -> None:
        async with PreparationQueue(n_threads=1) as queue:
            first = asyncio.create_task(
                queue.run(FLOOD, lambda: blocker.wait(DEADLINE_S), size_bytes=LARGE)
            )
            abandoned = [
                asyncio.create_task(queue.run(FLOOD, record("abandoned"), size_bytes=LARGE))
                for _ in range(100)
            ]
            await asyncio.sleep(0)
            for task in abandoned:
                task.cancel()
            await asyncio.gather(*abandoned, return_exceptions=True)
            last = asyncio.create_task(queue.run(QUIET, record("quiet"), size_bytes=LARGE))
            blocker.set()
            await asyncio.gather(first, last)

    asyncio.run(scenario())
    assert started == ["quiet"]


def test_a_preparation_that_was_abandoned_while_it_ran_frees_its_slot_at_its_end() -> None:
    running, blocker = threading.Event(), threading.Event()

    def block() -> None:
        running.set()
        blocker.wait(DEADLINE_S)

    async def scenario() -> None:
        async with PreparationQueue(n_threads=1) as queue:
            abandoned = asyncio.create_task(queue.run(FLOOD, block, size_bytes=LARGE))
            await asyncio.to_thread(running.wait, DEADLINE_S)
            abandoned.cancel()
            waiting = asyncio.create_task(queue.run(QUIET, lambda: 7, size_bytes=LARGE))
            await asyncio.gather(abandoned, return_exceptions=True)
            assert not waiting.done()
            blocker.set()
            assert await asyncio.wait_for(waiting, DEADLINE_S) == 7

    asyncio.run(scenario())


def test_a_preparation_that_takes_too_long_keeps_its_slot() -> None:
    blocker = threading.Event()

    async def scenario() -> None:
        async with PreparationQueue(n_threads=1) as queue:
            with pytest.raises(TimeoutError):
                await queue.run_in_turn(FLOOD, lambda: blocker.wait(DEADLINE_S), timeout_s=0.01)
            waiting = asyncio.create_task(queue.run_in_turn(QUIET, lambda: 7))
            await asyncio.sleep(0)
            assert not waiting.done()
            blocker.set()
            assert await asyncio.wait_for(waiting, DEADLINE_S) == 7

    asyncio.run(scenario())


def test_small_work_needs_no_turn() -> None:
    async def scenario() -> int:
        async with PreparationQueue(n_threads=1) as queue:
            return await queue.run(FLOOD, threading.get_ident, size_bytes=INLINE_BYTES)

    assert asyncio.run(scenario()) == threading.get_ident()


def test_held_bytes_are_bounded_by_tenant() -> None:
    held = HeldBytes(max_bytes=1000)
    bodies = [object() for _ in range(4)]
    held.hold(QUIET, bodies[0], 10)
    held.hold(FLOOD, bodies[1], 5000)  # a tenant's first body is always admitted
    with pytest.raises(TenantQueueFull, match="5000 bytes of your requests"):
        held.hold(FLOOD, bodies[2], 1)
    held.hold(QUIET, bodies[3], 400)
    for caller, body in ((FLOOD, bodies[1]), (QUIET, bodies[0]), (QUIET, bodies[3])):
        held.release(caller, body)
    assert held.n_bytes() == 0


def test_objects_are_counted_rather_than_bytes_of_json() -> None:
    assert held_bytes(3_000_000, 1_000_000) > 100_000_000
