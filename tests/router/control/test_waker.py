import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from control_stand_in import ControlStandIn
from prometheus_client import CollectorRegistry

from faasmoe_router.control.client import ControlClient
from faasmoe_router.control.metrics import ControlMetrics
from faasmoe_router.control.waker import Waker

TOKEN = "secret"
OnLoop = Callable[[Callable[[], Awaitable[None]]], None]


@asynccontextmanager
async def waking(control: ControlStandIn, missing: set[str], *, repeat_s: float = 60.0) -> Any:
    client = ControlClient(control.url, token=TOKEN)
    metrics = ControlMetrics(CollectorRegistry())
    waker = Waker(client, router="r", metrics=metrics, repeat_s=repeat_s)
    task = asyncio.create_task(waker.run(lambda: missing))
    try:
        yield waker
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.close()


async def until(condition: Callable[[], bool]) -> None:
    while True:
        if condition():
            return
        await asyncio.sleep(0.005)


def test_many_wishes_are_one_wake(control: ControlStandIn, on_loop: OnLoop) -> None:
    async def tell() -> None:
        async with waking(control, {"a", "b", "c"}) as waker:
            for _ in range(32):
                waker.want(["b", "a"])
            await until(lambda: bool(control.wakes))
            waker.want(["a", "c"])
            await until(lambda: len(control.wakes) == 2)
            assert control.wakes == [["b", "a"], ["c"]]

    on_loop(tell)


def test_what_is_not_missing_is_not_asked_for(control: ControlStandIn, on_loop: OnLoop) -> None:
    async def tell() -> None:
        async with waking(control, {"a"}) as waker:
            waker.want(["there", "a", "unknown"])
            await until(lambda: bool(control.wakes))
            assert control.wakes == [["a"]]

    on_loop(tell)


def test_a_wish_repeated_too_soon_is_sent_when_its_time_has_come(
    control: ControlStandIn, on_loop: OnLoop
) -> None:
    async def tell() -> None:
        async with waking(control, {"a"}, repeat_s=0.1) as waker:
            waker.want(["a"])
            await until(lambda: len(control.wakes) == 1)
            waker.want(["a"])
            await until(lambda: len(control.wakes) == 2)

    on_loop(tell)


def test_other_threads_may_wish(control: ControlStandIn, on_loop: OnLoop) -> None:
    async def tell() -> None:
        async with waking(control, {"a"}) as waker:
            await asyncio.sleep(0)  # the waker runs now
            thread = threading.Thread(target=waker.want_soon, args=(["a"],))
            thread.start()
            thread.join()
            await until(lambda: control.wakes == [["a"]])

    on_loop(tell)


@pytest.mark.parametrize("status", [401, 422, 503])
def test_a_refused_wake_is_sent_again_when_it_is_wanted_again(
    status: int, control: ControlStandIn, on_loop: OnLoop
) -> None:
    async def tell() -> None:
        control.status = status
        async with waking(control, {"a"}, repeat_s=0.05) as waker:
            waker.want(["a"])
            await until(lambda: control.n_refused == 1)
            control.status = 0
            waker.want(["a"])
            await until(lambda: control.wakes == [["a"]])

    on_loop(tell)
