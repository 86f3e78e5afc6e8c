import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from fake_control import FakeControl
from prometheus_client import CollectorRegistry

from faasmoe_router.control.activator import ActivationRequester
from faasmoe_router.control.client import ControlClient
from faasmoe_router.control.metrics import ControlLinkMetrics

TOKEN = "secret"
OnLoop = Callable[[Callable[[], Awaitable[None]]], None]


@asynccontextmanager
async def requesting(control: FakeControl, missing: set[str], *, repeat_s: float = 60.0) -> Any:
    client = ControlClient(control.url, token=TOKEN)
    metrics = ControlLinkMetrics(CollectorRegistry())
    requester = ActivationRequester(client, router_name="r", metrics=metrics, repeat_s=repeat_s)
    task = asyncio.create_task(requester.run(lambda: missing))
    try:
        yield requester
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.close()


async def until(condition: Callable[[], bool]) -> None:
    while True:
        if condition():
            return
        await asyncio.sleep(0.005)


def test_concurrent_requests_for_a_function_are_sent_once(
    control: FakeControl, on_loop: OnLoop
) -> None:
    async def scenario() -> None:
        async with requesting(control, {"a", "b", "c"}) as requester:
            for _ in range(32):
                requester.request(["b", "a"])
            await until(lambda: bool(control.activation_requests))
            requester.request(["a", "c"])
            await until(lambda: len(control.activation_requests) == 2)
            assert control.activation_requests == [["b", "a"], ["c"]]

    on_loop(scenario)


def test_functions_with_an_address_are_not_requested(control: FakeControl, on_loop: OnLoop) -> None:
    async def scenario() -> None:
        async with requesting(control, {"a"}) as requester:
            requester.request(["activated", "a", "unknown"])
            await until(lambda: bool(control.activation_requests))
            assert control.activation_requests == [["a"]]

    on_loop(scenario)


def test_a_repeated_request_is_sent_after_the_repeat_interval(
    control: FakeControl, on_loop: OnLoop
) -> None:
    async def scenario() -> None:
        async with requesting(control, {"a"}, repeat_s=0.1) as requester:
            requester.request(["a"])
            await until(lambda: len(control.activation_requests) == 1)
            requester.request(["a"])
            await until(lambda: len(control.activation_requests) == 2)

    on_loop(scenario)


def test_functions_can_be_requested_from_other_threads(
    control: FakeControl, on_loop: OnLoop
) -> None:
    async def scenario() -> None:
        async with requesting(control, {"a"}) as requester:
            await asyncio.sleep(0)  # lets the requester start
            thread = threading.Thread(target=requester.request_threadsafe, args=(["a"],))
            thread.start()
            thread.join()
            await until(lambda: control.activation_requests == [["a"]])

    on_loop(scenario)


@pytest.mark.parametrize("status", [401, 422, 503])
def test_a_rejected_request_is_sent_again_when_it_is_repeated(
    status: int, control: FakeControl, on_loop: OnLoop
) -> None:
    async def scenario() -> None:
        control.status = status
        async with requesting(control, {"a"}, repeat_s=0.05) as requester:
            requester.request(["a"])
            await until(lambda: control.n_rejected == 1)
            control.status = 0
            requester.request(["a"])
            await until(lambda: control.activation_requests == [["a"]])

    on_loop(scenario)
