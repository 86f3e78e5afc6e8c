import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from metric_samples import sample_value
from prometheus_client import CollectorRegistry

from faasmoe_router.control.activator import ActivationQueueLimits, Activator
from faasmoe_router.control.metrics import ControlLinkMetrics
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.errors import ActivationQueueFull, ActivationTimeout, EngineUnavailable


class FakeFunctions:
    """Two functions: `a` is needed from one token on, `b` from ten tokens on."""

    def __init__(self) -> None:
        self.missing = {"a": 1, "b": 10}
        self.can_fall_back = False
        self.n_fallback_requests = 0
        self.continue_fallback = asyncio.Event()

    @property
    def activated_below_tokens(self) -> float:
        return min(self.missing.values(), default=float("inf"))

    def missing_for(self, n_tokens: int) -> Sequence[str]:
        return [name for name, needs in self.missing.items() if needs <= n_tokens]

    async def enable_local_fallback(self, n_tokens: int) -> bool:
        self.n_fallback_requests += 1
        if self.can_fall_back:
            await self.continue_fallback.wait()
            for name in self.missing_for(n_tokens):
                del self.missing[name]
        return self.can_fall_back


class ActivatorHarness:
    """An activator, its fakes, and a clock that the test sets."""

    def __init__(self, **limits: Any) -> None:
        self.functions = FakeFunctions()
        self.requests: list[list[str]] = []
        self.load = LoadMeter()
        self.now_s = 0.0
        self.registry = CollectorRegistry()
        self.activator = Activator(
            self.functions,
            request_activation=lambda names: self.requests.append(list(names)),
            limits=ActivationQueueLimits(**limits),
            metrics=ControlLinkMetrics(self.registry),
            load=self.load,
            clock=lambda: self.now_s,
        )

    def add_address(self, name: str) -> None:
        del self.functions.missing[name]
        self.activator.on_table_changed()

    def send(self, n_tokens: int, size_bytes: int = 1) -> "asyncio.Task[float]":
        return asyncio.create_task(
            self.activator.wait_for_activation(n_tokens, size_bytes=size_bytes)
        )

    def metric(self, name: str) -> float:
        return sample_value(self.registry, f"faasmoe_router_{name}")


async def run_pending_tasks() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def run_scenario(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(120):
            await scenario()

    asyncio.run(bounded())


def test_a_request_is_released_when_all_its_functions_have_addresses() -> None:
    async def scenario() -> None:
        harness = ActivatorHarness()
        assert not harness.activator.is_activated_for(1)
        queued = [harness.send(10) for _ in range(32)]
        await run_pending_tasks()
        assert harness.requests == [["a", "b"]]
        assert harness.metric("queued_requests") == harness.load.queued == 32
        harness.now_s = 1.5
        harness.add_address("a")
        await run_pending_tasks()
        assert not any(h.done() for h in queued)
        harness.now_s = 2.5
        harness.add_address("b")
        assert await asyncio.gather(*queued) == [2.5] * 32
        assert harness.activator.is_activated_for(10)
        assert harness.metric("queued_requests") == harness.load.queued == 0
        assert harness.metric("cold_start_seconds_count") == 32

    run_scenario(scenario)


def test_a_request_whose_functions_came_before_it_was_queued_does_not_wait() -> None:
    async def scenario() -> None:
        harness = ActivatorHarness()
        assert not harness.activator.is_activated_for(10)
        harness.add_address("a")
        harness.add_address("b")  # between the question and the wait
        assert await harness.activator.wait_for_activation(10, size_bytes=1) == 0
        assert harness.metric("cold_start_seconds_count") == 0

    run_scenario(scenario)


def test_a_request_waits_only_for_the_functions_that_it_needs() -> None:
    async def scenario() -> None:
        harness = ActivatorHarness()
        small, large = harness.send(2), harness.send(12)
        await run_pending_tasks()
        assert harness.requests == [["a"], ["a", "b"]]
        harness.add_address("a")
        await small
        assert not large.done()
        harness.add_address("b")
        await large

    run_scenario(scenario)


def test_awaited_functions_are_requested_again_until_no_request_waits() -> None:
    async def scenario() -> None:
        harness = ActivatorHarness()
        queued = harness.send(1)
        await run_pending_tasks()
        harness.activator.repeat_request()
        assert harness.requests == [["a"], ["a"]]
        harness.add_address("a")
        await queued
        harness.activator.repeat_request()
        assert harness.requests == [["a"], ["a"]]

    run_scenario(scenario)


def test_a_request_is_rejected_after_the_timeout() -> None:
    async def scenario() -> None:
        harness = ActivatorHarness(timeout_s=0.01)
        with pytest.raises(ActivationTimeout, match=r"within 0\.01 s"):
            await harness.activator.wait_for_activation(1, size_bytes=1)
        assert harness.metric("queued_requests") == 0
        assert harness.metric("cold_start_seconds_count") == 0
        harness.activator.repeat_request()
        assert len(harness.requests) == 1

    run_scenario(scenario)


def test_local_fallback_after_the_timeout_releases_all_queued_requests() -> None:
    async def scenario() -> None:
        harness = ActivatorHarness(timeout_s=0.5)
        harness.functions.can_fall_back = True
        first = harness.send(1)
        while not harness.functions.n_fallback_requests:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        second = harness.send(1)
        await run_pending_tasks()
        harness.functions.continue_fallback.set()
        await asyncio.gather(first, second)
        assert harness.functions.n_fallback_requests == 1
        assert harness.metric("queued_requests") == 0
        assert harness.metric("cold_start_seconds_count") == 2

    run_scenario(scenario)


@pytest.mark.parametrize(
    "limits", [{"max_requests": 2}, {"max_bytes": 25}], ids=["requests", "bytes"]
)
def test_a_full_queue_rejects_new_requests_and_keeps_queued_ones(limits: dict[str, int]) -> None:
    async def scenario() -> None:
        harness = ActivatorHarness(**limits)
        queued = [harness.send(1, 10) for _ in range(2)]
        await run_pending_tasks()
        with pytest.raises(ActivationQueueFull, match="queued for activation"):
            await harness.activator.wait_for_activation(1, size_bytes=10)
        harness.add_address("a")
        await asyncio.gather(*queued)
        harness.functions.missing["a"] = 1
        again = harness.send(1, 10)
        await run_pending_tasks()
        assert not again.done()
        harness.add_address("a")
        await again

    run_scenario(scenario)


def test_a_cancelled_request_leaves_the_queue() -> None:
    async def scenario() -> None:
        harness = ActivatorHarness(max_requests=1)
        queued = harness.send(1)
        await run_pending_tasks()
        queued.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await queued
        assert harness.metric("queued_requests") == 0
        other = harness.send(1)
        await run_pending_tasks()
        assert not other.done()
        harness.add_address("a")
        await other

    run_scenario(scenario)


def test_closing_rejects_queued_and_new_requests() -> None:
    async def scenario() -> None:
        harness = ActivatorHarness()
        queued = [harness.send(1) for _ in range(3)]
        await run_pending_tasks()
        harness.activator.close()
        results = await asyncio.gather(*queued, return_exceptions=True)
        assert [type(r) for r in results] == [EngineUnavailable] * 3
        with pytest.raises(EngineUnavailable):
            await harness.activator.wait_for_activation(1, size_bytes=1)

    run_scenario(scenario)


def test_an_awaited_function_counts_as_one_call_in_flight() -> None:
    async def scenario() -> None:
        harness = ActivatorHarness()
        queued = [harness.send(1) for _ in range(8)]
        await run_pending_tasks()
        harness.now_s = 3.0
        assert harness.load.snapshot(3.0)["a"].in_flight_s == 3.0
        harness.add_address("a")
        await asyncio.gather(*queued)
        assert harness.load.snapshot(9.0)["a"] == (3.0, 0, 0)

    run_scenario(scenario)


def test_a_function_that_loses_its_address_again_is_requested_again() -> None:
    async def scenario() -> None:
        harness = ActivatorHarness()
        queued = harness.send(10)
        await run_pending_tasks()
        harness.add_address("a")
        harness.functions.missing["a"] = 1
        harness.activator.on_table_changed()
        assert sorted(harness.requests[-1]) == ["a", "b"]
        harness.add_address("b")
        await run_pending_tasks()
        assert not queued.done()
        harness.add_address("a")
        await queued

    run_scenario(scenario)
