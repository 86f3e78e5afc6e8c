"""The control loop over sandboxes that are real HTTP servers, with a clock that runs fast."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from weakref import WeakSet

import pytest
from aiohttp import web
from boxes import (
    QUICK,
    TIMING,
    Box,
    Boxes,
    controlling,
    eventually,
    model_of,
    refused,
    reporting,
    serving,
    world,
)

from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.reports import FunctionLoad, LoadReport
from faasmoe_operator.control.table_feed import TableFeed


def load(concurrency: float, *functions: str, calls: int = 1, rows: int = 1) -> LoadReport:
    return LoadReport("r", {name: FunctionLoad(concurrency, calls, rows) for name in functions})


async def settled(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, and see that it goes on holding for some ticks."""
    await eventually(condition)
    for _ in range(10):
        await asyncio.sleep(TIMING.tick_s)
        assert condition()


def serves_alone(controller: Controller, function: str) -> bool:
    """Wait for a function as a caller does, and tell whether it and no other serves."""
    controller.wake([function])
    return serving(controller) == {function}


@pytest.mark.parametrize("pool", [0, 2])
def test_idle_keeps_the_pool_and_nothing_else(pool: int) -> None:
    async def story() -> None:
        async with world(model_of(warm_pool=pool)) as (controller, boxes):
            await settled(lambda: len(boxes.boxes) == controller.fleet.n_generic() == pool)
            assert serving(controller) == set()

    asyncio.run(story())


def test_a_wake_is_answered_from_the_pool_at_once() -> None:
    async def story() -> None:
        async with world(model_of()) as (controller, boxes):
            await eventually(lambda: controller.fleet.n_generic() == 1)
            (box,) = boxes.boxes.values()
            controller.wake(["f1"])
            assert controller.fleet.n_generic() == 0  # begun, without waiting for a tick
            await eventually(lambda: serving(controller) == {"f1"})
            assert box.calls == ["PUT f1"]
            await settled(lambda: controller.fleet.n_generic() == 1)

    asyncio.run(story())


def test_however_many_wake_a_function_one_activation_runs() -> None:
    async def story() -> None:
        async with world(model_of()) as (controller, boxes):
            for _ in range(50):
                controller.wake(["f0", "f1", "f2"])
            await eventually(lambda: len(serving(controller)) == 3)
            await settled(lambda: len(boxes.boxes) == 4)
            puts = [call for box in boxes.boxes.values() for call in box.calls]
            assert sorted(puts) == ["PUT f0", "PUT f1", "PUT f2"]
            text = controller.metrics.text().decode()
            assert 'activations_total{outcome="ready"} 3.0' in text
            assert "faasmoe_control_cold_start_seconds_count 3.0" in text

    asyncio.run(story())


def test_functions_share_a_sandbox_where_capacity_allows() -> None:
    async def story() -> None:
        async with world(model_of(6, capacity=3, warm_pool=0)) as (controller, boxes):
            controller.wake([f"f{index}" for index in range(6)])
            await eventually(lambda: len(serving(controller)) == 6)
            assert sorted(len(box.functions) for box in boxes.boxes.values()) == [3, 3]

    asyncio.run(story())


def test_functions_go_back_to_zero_when_nobody_calls() -> None:
    async def story() -> None:
        async with world(model_of(warm_pool=0)) as (controller, boxes):
            controller.wake(["f0", "f1"])
            await eventually(lambda: len(serving(controller)) == 2)
            controller.take(load(1.0, "f0", "f1"))
            controller.take(LoadReport("r"))
            await eventually(lambda: not boxes.boxes, "zero")
            await settled(lambda: not boxes.boxes and not serving(controller))
            controller.wake(["f1"])
            await eventually(lambda: serving(controller) == {"f1"})

    asyncio.run(story())


def test_load_buys_replicas_and_its_end_gives_them_back() -> None:
    async def story() -> None:
        async with world(model_of(1, warm_pool=0)) as (controller, boxes):
            controller.wake(["f0"])
            async with reporting(controller, load(11.0, "f0")):
                await settled(lambda: len(controller.feed.table.functions[0].addresses) == 4)
                addresses = controller.feed.table.functions[0].addresses
                assert sorted(addresses) == sorted(box.address for box in boxes.boxes.values())
            await eventually(lambda: not boxes.boxes, "zero")

    asyncio.run(story())


def test_a_minimum_is_kept_without_any_call() -> None:
    async def story() -> None:
        scaling = replace(QUICK, min_scale=1)
        async with world(model_of(2, warm_pool=0, scaling=scaling)) as (controller, boxes):
            await settled(lambda: serving(controller) == {"f0", "f1"} and len(boxes.boxes) == 2)

    asyncio.run(story())


def test_an_address_leaves_the_table_before_its_function_is_detached() -> None:
    seen: list[bool] = []

    def watching(feed: TableFeed) -> Callable[[web.Request], Awaitable[None]]:
        async def watch(request: web.Request) -> None:
            if request.method == "DELETE":
                seen.append(any(entry.addresses for entry in feed.table.functions))

        return watch

    async def story() -> None:
        async with world(model_of(1, warm_pool=0)) as (controller, boxes):
            boxes.faults = [watching(controller.feed)]
            controller.feed.n_followers = 1
            controller.wake(["f0"])
            await eventually(lambda: bool(serving(controller)))
            (box,) = boxes.boxes.values()
            controller.take(LoadReport("r"))
            await eventually(lambda: not serving(controller))
            assert box.calls == ["PUT f0"]  # calls on their way still find it
            await eventually(lambda: not boxes.boxes)
            assert box.calls == ["PUT f0", "DELETE f0"]
            assert seen == [False]

    asyncio.run(story())


def test_a_function_that_is_wanted_again_while_it_leaves_stays() -> None:
    async def story() -> None:
        timing = replace(TIMING, drain_s=60.0)
        async with world(model_of(1, warm_pool=0), timing=timing) as (controller, boxes):
            controller.feed.n_followers = 1
            controller.wake(["f0"])
            await eventually(lambda: bool(serving(controller)))
            (box,) = boxes.boxes.values()
            controller.take(LoadReport("r"))
            await eventually(lambda: not serving(controller))
            controller.wake(["f0"])
            assert serving(controller) == {"f0"}
            assert box.calls == ["PUT f0"]
            assert list(boxes.boxes) == [box.id]

    asyncio.run(story())


def test_a_restarted_control_keeps_what_it_finds() -> None:
    async def story() -> None:
        boxes, model = Boxes(), model_of(3, warm_pool=1)
        try:
            async with controlling(model, boxes) as first:
                first.wake(["f0", "f2"])
                await eventually(lambda: serving(first) == {"f0", "f2"})
                await settled(lambda: first.fleet.n_generic() == 1)
                before = {e.spec.id: e.addresses for e in first.feed.table.functions}
            created = boxes.n_created
            async with controlling(model, boxes) as second:
                assert {e.spec.id: e.addresses for e in second.feed.table.functions} == before
                async with reporting(second, load(1.0, "f0", "f2")):
                    await settled(lambda: serving(second) == {"f0", "f2"})
                    assert boxes.n_created == created
                    second.wake(["f1"])
                    await eventually(lambda: serving(second) == {"f0", "f1", "f2"})
                await eventually(lambda: len(boxes.boxes) == 1, "only the pool")
            calls = [call for box in boxes.boxes.values() for call in box.calls]
            assert "PUT f0" not in calls[1:]
        finally:
            await boxes.end()

    asyncio.run(story())


def test_functions_of_an_earlier_plan_are_detached() -> None:
    async def story() -> None:
        boxes, model = Boxes(), model_of(1, warm_pool=1)
        body = {"store": "/store", "model_digest": "sha256:9", "layers": [7], "experts": [0]}
        box = Box("left", functions={"old": body})
        try:
            await boxes.add(box, model.template)
            async with controlling(model, boxes) as controller:
                await eventually(lambda: controller.fleet.n_generic() == 1)
                assert box.calls == ["DELETE old"]
                assert list(boxes.boxes) == ["left"]
        finally:
            await boxes.end()

    asyncio.run(story())


def test_a_lost_sandbox_is_replaced() -> None:
    async def story() -> None:
        async with world(model_of(1, warm_pool=0)) as (controller, boxes):
            controller.wake(["f0"])
            async with reporting(controller, load(1.0, "f0")):
                await eventually(lambda: bool(serving(controller)))
                (lost,) = boxes.boxes
                await boxes.kill(lost)
                await eventually(lambda: bool(boxes.holders("f0")), "a replacement")
                assert lost not in boxes.boxes
                await eventually(lambda: bool(serving(controller)))

    asyncio.run(story())


def test_a_broken_platform_is_asked_less_and_less() -> None:
    async def story() -> None:
        async with world(model_of(1, warm_pool=1)) as (controller, boxes):
            await eventually(lambda: controller.fleet.n_generic() == 1)
            boxes.broken = True
            controller.wake(["f0"])
            before = boxes.n_created
            await asyncio.sleep(20 * TIMING.tick_s)  # 20 s of its clock
            assert boxes.n_created - before <= 10
            boxes.broken = False
            await eventually(lambda: controller.fleet.n_generic() == 1, "the pool again")

    asyncio.run(story())


def test_popular_functions_come_first() -> None:
    async def story() -> None:
        model = model_of(3, capacity=3, warm_pool=1)
        async with world(model) as (controller, boxes):
            await eventually(lambda: controller.fleet.n_generic() == 1)
            controller.take(load(0.0, "f2", rows=100))
            controller.take(load(0.0, "f1", rows=10))
            (box,) = boxes.boxes.values()
            controller.wake(["f0", "f1", "f2"])
            await eventually(lambda: len(serving(controller)) == 3)
            assert box.calls == ["PUT f2", "PUT f1", "PUT f0"]

    asyncio.run(story())


async def _refuses_to_attach(request: web.Request) -> web.Response | None:
    return refused(409, "attach_refused") if request.method == "PUT" else None


async def _answers_garbage(request: web.Request) -> web.Response | None:
    return web.Response(body=b"\x00\x01<html>") if request.method == "PUT" else None


async def _hangs_when_it_attaches(request: web.Request) -> web.Response | None:
    if request.method == "PUT":
        await asyncio.Event().wait()
    return None


async def _forgets_what_it_attached(request: web.Request) -> web.Response | None:
    return web.json_response({}, status=201) if request.method == "PUT" else None


_LISTED: WeakSet[web.Application] = WeakSet()


async def _holds_what_nobody_attached(request: web.Request) -> web.Response | None:
    if request.method != "GET":
        return None
    foreign = {"id": "x", "layers": [0], "experts": [0], "model_digest": "m", "size_bytes": 1}
    was_listed = request.app in _LISTED
    _LISTED.add(request.app)
    return web.json_response({"functions": [foreign] * was_listed})


async def _lists_garbage(request: web.Request) -> web.Response | None:
    return web.json_response({"functions": [7]}) if request.method == "GET" else None


async def _lists_a_function_twice(request: web.Request) -> web.Response | None:
    body = {"id": "f0", "layers": [0], "experts": [0, 1], "model_digest": "m", "size_bytes": 1}
    answer = web.json_response({"functions": [body, body]})
    return answer if request.method == "GET" else None


async def _never_answers(request: web.Request) -> web.Response | None:
    await asyncio.Event().wait()
    return None


async def _asks_for_another_token(request: web.Request) -> web.Response | None:
    return refused(401, "unauthorized")


FAULTS = [
    _refuses_to_attach,
    _answers_garbage,
    _hangs_when_it_attaches,
    _forgets_what_it_attached,
    _holds_what_nobody_attached,
    _lists_garbage,
    _lists_a_function_twice,
    _never_answers,
    _asks_for_another_token,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.strip("_"))
def test_a_sandbox_that_misbehaves_is_ejected_and_replaced(
    fault: Callable[[web.Request], Awaitable[web.Response | None]],
) -> None:
    async def story() -> None:
        boxes, model = Boxes(), model_of(1, warm_pool=0)
        boxes.faults = [fault]
        try:
            async with controlling(model, boxes) as controller:
                controller.wake(["f0"])
                async with reporting(controller, load(1.0, "f0")):
                    await eventually(lambda: boxes.holders("f0") == ["box2"], "replaced")
                    await eventually(lambda: "box1" not in boxes.boxes, "ejected")
                    await eventually(lambda: serving(controller) == {"f0"})
                    (address,) = controller.feed.table.functions[0].addresses
                    assert address == boxes.boxes["box2"].address
        finally:
            await boxes.end()

    asyncio.run(story())


def test_where_memory_is_short_the_least_lately_used_makes_room() -> None:
    async def story() -> None:
        model = model_of(3, capacity=8, warm_pool=0, memory_limit=2)
        async with world(model) as (controller, boxes):
            controller.wake(["f0"])
            await eventually(lambda: serving(controller) == {"f0"})
            controller.wake(["f1"])
            async with reporting(controller, load(1.0, "f1")):
                await eventually(lambda: serving(controller) == {"f0", "f1"})
                controller.wake(["f2"])
                await eventually(lambda: serving(controller) == {"f1", "f2"})
                assert not boxes.holders("f0")

    asyncio.run(story())


def test_one_that_made_room_comes_back_when_it_is_called_again() -> None:
    async def story() -> None:
        model = model_of(2, warm_pool=0, memory_limit=1)
        async with world(model) as (controller, _):
            for function in ("f0", "f1", "f0", "f1"):
                await eventually(partial(serves_alone, controller, function))

    asyncio.run(story())


def test_callers_wait_while_all_that_has_room_is_in_use_and_are_told_of() -> None:
    async def story() -> None:
        model = model_of(2, warm_pool=0, memory_limit=1)
        async with world(model) as (controller, boxes):
            controller.wake(["f0"])
            async with reporting(controller, load(1.0, "f0")):
                await eventually(lambda: serving(controller) == {"f0"})
                controller.wake(["f1"])
                told = "memory: 1 functions wait for others to be idle, 0 fit in no sandbox"
                await settled(lambda: serving(controller) == {"f0"} and controller.trouble == told)
                assert boxes.n_created == 1
            await eventually(partial(serves_alone, controller, "f1"))
            await eventually(lambda: controller.trouble == "")

    asyncio.run(story())


def test_a_sandbox_takes_no_more_than_it_says_that_it_may() -> None:
    async def story() -> None:
        async with world(model_of(4, capacity=8, warm_pool=0)) as (controller, boxes):
            boxes.memory_limit = 2
            controller.wake([f"f{index}" for index in range(4)])
            await eventually(lambda: len(serving(controller)) == 4)
            assert [len(box.functions) for box in boxes.boxes.values()] == [2, 2]
            assert all(len(box.calls) == 2 for box in boxes.boxes.values())

    asyncio.run(story())


def test_a_sandbox_without_memory_for_one_more_serves_on_and_the_other_goes_elsewhere() -> None:
    async def full(request: web.Request) -> web.Response | None:
        is_second = request.method == "PUT" and request.path.endswith("f1")
        return refused(503, "out_of_memory") if is_second else None

    async def story() -> None:
        async with world(model_of(2, capacity=8, warm_pool=0)) as (controller, boxes):
            boxes.faults = [full]
            controller.wake(["f0"])
            await eventually(lambda: serving(controller) == {"f0"})
            (first,) = boxes.boxes
            controller.wake(["f1"])
            await eventually(lambda: serving(controller) == {"f0", "f1"})
            assert boxes.holders("f0") == [first]
            assert boxes.holders("f1") != [first]

    asyncio.run(story())


def test_no_sandbox_after_another_is_created_for_what_fits_in_none() -> None:
    async def story() -> None:
        model = model_of(1, warm_pool=0, size_bytes=2)
        async with world(model) as (controller, boxes):
            boxes.memory_limit = 1
            controller.wake(["f0"])
            told = "memory: 0 functions wait for others to be idle, 1 fit in no sandbox"
            await settled(lambda: controller.trouble == told)
            assert boxes.n_created == 1

    asyncio.run(story())
