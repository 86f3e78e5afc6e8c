import asyncio
from contextlib import AsyncExitStack

import pytest

from faasmoe_router.engine.fair_queue import Share
from faasmoe_router.errors import EngineQueueFull, TenantQueueFull
from faasmoe_router.vllm_backend.fair_gate import FairGate


class Request:
    """A request that takes a place until it is told to end."""

    def __init__(self, gate: FairGate, tenant: str, number: int, order: list[str]) -> None:
        self.may_end = asyncio.Event()
        self.started = asyncio.Event()
        self._gate, self._tenant, self._id, self._order = gate, tenant, f"{tenant}{number}", order
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async with self._gate.place(self._tenant, self._id, n_prompt_tokens=10, priority=0):
            self._order.append(self._id)
            self.started.set()
            self._gate.charge(self._tenant, self._id, n_computed=15, n_generated=5)
            await self.may_end.wait()


async def run_all(requests: list[Request]) -> None:
    for request in requests:
        request.may_end.set()
    await asyncio.gather(*(request.task for request in requests))


def test_a_quiet_tenants_request_overtakes_those_that_a_flooding_tenant_has_waiting() -> None:
    async def run() -> list[str]:
        gate, order = FairGate(slots=1, max_waiting=100), list[str]()
        gate.set_tenants({"loud": Share(), "quiet": Share()}, {})
        requests = [Request(gate, "loud", number, order) for number in range(5)]
        await requests[0].started.wait()
        requests.append(Request(gate, "quiet", 0, order))
        await asyncio.sleep(0)  # it is in the queue now
        await run_all(requests)
        assert gate.n_requests == 0
        return order

    order = asyncio.run(run())
    assert sorted(order) == ["loud0", "loud1", "loud2", "loud3", "loud4", "quiet0"]
    assert order.index("quiet0") <= 2


def test_a_cancelled_request_gives_its_place_back() -> None:
    async def run() -> None:
        gate, order = FairGate(slots=1, max_waiting=10), list[str]()
        first, second = (Request(gate, "a", number, order) for number in range(2))
        await first.started.wait()
        first.task.cancel()
        await second.started.wait()
        await run_all([second])
        assert gate.sequence_counts("a") == (0, 0)

    asyncio.run(run())


def test_a_waiting_request_that_is_cancelled_leaves_the_queue() -> None:
    async def run() -> None:
        gate, order = FairGate(slots=1, max_waiting=10), list[str]()
        first, second = (Request(gate, "a", number, order) for number in range(2))
        await first.started.wait()
        second.task.cancel()
        await asyncio.gather(second.task, return_exceptions=True)
        assert gate.sequence_counts("a") == (1, 0)
        await run_all([first])
        assert order == ["a0"]

    asyncio.run(run())


def test_more_requests_than_may_wait_are_refused() -> None:
    async def run() -> None:
        gate, order = FairGate(slots=1, max_waiting=2), list[str]()
        gate.set_tenants({"a": Share(max_queued=1), "b": Share()}, {})
        requests = [Request(gate, "a", number, order) for number in range(2)]
        await requests[0].started.wait()
        with pytest.raises(TenantQueueFull):
            gate.check_capacity("a")
        requests.append(Request(gate, "b", 0, order))
        await asyncio.sleep(0)
        with pytest.raises(EngineQueueFull):
            gate.check_capacity("b")
        await run_all(requests)

    asyncio.run(run())


def test_computed_tokens_are_drained_once() -> None:
    async def run() -> None:
        gate = FairGate(slots=2, max_waiting=2)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(gate.place("a", "1", n_prompt_tokens=3, priority=0))
            gate.charge("a", "1", n_computed=5, n_generated=2)
            gate.charge("a", "1", n_computed=1, n_generated=1)
        assert gate.drain_computed() == {"a": 6}
        assert gate.drain_computed() == {}

    asyncio.run(run())


def test_virtual_time_is_the_priority_so_that_the_tenant_served_most_is_preempted_first() -> None:
    async def run() -> None:
        gate = FairGate(slots=2, max_waiting=2)
        gate.set_tenants({"a": Share(), "b": Share(weight=4)}, {})
        async with AsyncExitStack() as stack:
            for tenant in ("a", "b"):
                place = gate.place(tenant, tenant, n_prompt_tokens=40, priority=0)
                await stack.enter_async_context(place)
            gate.charge("a", "a", n_computed=100, n_generated=100)
            gate.charge("b", "b", n_computed=100, n_generated=100)
            assert gate.priority("b") < gate.priority("a")

    asyncio.run(run())


def test_cached_prefixes_are_shared_within_a_group_and_with_a_requests_own_salt_only() -> None:
    gate = FairGate(slots=1, max_waiting=1)
    assert gate.cache_salt("", None) is None
    gate.set_tenants({"a": Share(), "b": Share(), "c": Share()}, {"a": "g", "b": "g"})
    assert gate.cache_salt("a", None) == gate.cache_salt("b", None)
    salts = [gate.cache_salt("a", None), gate.cache_salt("c", None), gate.cache_salt("a", "x")]
    assert len({*salts, gate.cache_salt("c", "x")}) == 4
    assert gate.cache_salt("a", "x") == gate.cache_salt("b", "x")


def test_requests_that_arrive_during_a_pause_wait_for_its_end() -> None:
    async def run() -> None:
        gate, order = FairGate(slots=2, max_waiting=2), list[str]()
        with gate.pause():
            requests = [Request(gate, "a", number, order) for number in range(2)]
            await asyncio.sleep(0)
            assert gate.sequence_counts("a") == (0, 2)
        await asyncio.gather(*(request.started.wait() for request in requests))
        await run_all(requests)

    asyncio.run(run())
