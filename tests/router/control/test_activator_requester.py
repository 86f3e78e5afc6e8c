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


def test_many_wishes_are_one_wake(control: FakeControl, on_loop: OnLoop) -> None:
    async def scenario() -> None:
        async with requesting(control, {"a", "b", "c"}) as waker:
            for _ in range(32):
                waker.want(["b", "a"])
            await until(lambda: bool(control.activation_requests))
            waker.want(["a", "c"])
            await until(lambda: len(control.activation_requests) == 2)
            assert control.activation_requests == [["b", "a"], ["c"]]

    on_loop(scenario)


def test_what_is_not_missing_is_not_asked_for(control: FakeControl, on_loop: OnLoop) -> None:
    async def scenario() -> None:
        async with requesting(control, {"a"}) as waker:
            waker.want(["there", "a", "unknown"])
            await until(lambda: bool(control.activation_requests))
            assert control.activation_requests == [["a"]]

    on_loop(scenario)


def test_a_wish_repeated_too_soon_is_sent_when_its_time_has_come(
    control: FakeControl, on_loop: OnLoop
) -> None:
    async def scenario() -> None:
        async with requesting(control, {"a"}, repeat_s=0.1) as waker:
            waker.want(["a"])
            await until(lambda: len(control.activation_requests) == 1)
            waker.want(["a"])
            await until(lambda: len(control.activation_requests) == 2)

    on_loop(scenario)


def test_other_threads_may_wish(control: FakeControl, on_loop: OnLoop) -> None:
    async def scenario() -> None:
        async with requesting(control, {"a"}) as waker:
            await asyncio.sleep(0)  # the waker runs now
            thread = threading.Thread(target=waker.want_soon, args=(["a"],))
            thread.start()
            thread.join()
            await until(lambda: control.activation_requests == [["a"]])

    on_loop(scenario)


@pytest.mark.parametrize("status", [401, 422, 503])
def test_a_refused_wake_is_sent_again_when_it_is_wanted_again(
    status: int, control: FakeControl, on_loop: OnLoop
) -> None:
    async def scenario() -> None:
        control.status = status
        async with requesting(control, {"a"}, repeat_s=0.05) as waker:
            waker.want(["a"])
            await until(lambda: control.n_rejected == 1)
            control.status = 0
            waker.want(["a"])
            await until(lambda: control.activation_requests == [["a"]])

    on_loop(scenario)
