"""The control loop over sandboxes that are real HTTP servers, with a clock that runs fast."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from weakref import WeakSet

import pytest
from aiohttp import web
from fake_platform import (
    FAST_SCALING,
    TIMING,
    FakePlatform,
    SandboxServer,
    controller_and_platform,
    error_response,
    eventually,
    make_model,
    reporting_load,
    routable_functions,
    running_controller,
)

from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.load_reports import LoadReport, ReportedLoad
from faasmoe_operator.control.routing_table import RoutingTablePublisher


def load(concurrency: float, *functions: str, calls: int = 1, rows: int = 1) -> LoadReport:
    return LoadReport("r", {name: ReportedLoad(concurrency, calls, rows) for name in functions})


async def wait_until_stable(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, and see that it goes on holding for some ticks."""
    await eventually(condition)
    for _ in range(10):
        await asyncio.sleep(TIMING.tick_s)
        assert condition()


def activates_alone(controller: Controller, function: str) -> bool:
    """Wait for a function as a caller does, and tell whether it and no other serves."""
    controller.activate([function])
    return routable_functions(controller) == {function}


@pytest.mark.parametrize("pool", [0, 2])
def test_idle_keeps_the_pool_and_nothing_else(pool: int) -> None:
    async def story() -> None:
        async with controller_and_platform(make_model(warm_pool=pool)) as (controller, boxes):
            await wait_until_stable(
                lambda: len(boxes.servers) == controller.fleet.n_generic() == pool
            )
            assert routable_functions(controller) == set()

    asyncio.run(story())


def test_a_wake_is_answered_from_the_pool_at_once() -> None:
    async def story() -> None:
        async with controller_and_platform(make_model()) as (controller, boxes):
            await eventually(lambda: controller.fleet.n_generic() == 1)
            (box,) = boxes.servers.values()
            controller.activate(["f1"])
            assert controller.fleet.n_generic() == 0  # begun, without waiting for a tick
            await eventually(lambda: routable_functions(controller) == {"f1"})
            assert box.calls == ["PUT f1"]
            await wait_until_stable(lambda: controller.fleet.n_generic() == 1)

    asyncio.run(story())


def test_however_many_wake_a_function_one_activation_runs() -> None:
    async def story() -> None:
        async with controller_and_platform(make_model()) as (controller, boxes):
            for _ in range(50):
                controller.activate(["f0", "f1", "f2"])
            await eventually(lambda: len(routable_functions(controller)) == 3)
            await wait_until_stable(lambda: len(boxes.servers) == 4)
            puts = [call for box in boxes.servers.values() for call in box.calls]
            assert sorted(puts) == ["PUT f0", "PUT f1", "PUT f2"]
            text = controller.metrics.render().decode()
            assert 'activations_total{outcome="ready"} 3.0' in text
            assert "faasmoe_control_cold_start_seconds_count 3.0" in text

    asyncio.run(story())


def test_functions_share_a_sandbox_where_capacity_allows() -> None:
    async def story() -> None:
        async with controller_and_platform(make_model(6, capacity=3, warm_pool=0)) as (
            controller,
            boxes,
        ):
            controller.activate([f"f{index}" for index in range(6)])
            await eventually(lambda: len(routable_functions(controller)) == 6)
            assert sorted(len(box.functions) for box in boxes.servers.values()) == [3, 3]

    asyncio.run(story())


def test_functions_go_back_to_zero_when_nobody_calls() -> None:
    async def story() -> None:
        async with controller_and_platform(make_model(warm_pool=0)) as (controller, boxes):
            controller.activate(["f0", "f1"])
            await eventually(lambda: len(routable_functions(controller)) == 2)
            controller.add_load_report(load(1.0, "f0", "f1"))
            controller.add_load_report(LoadReport("r"))
            await eventually(lambda: not boxes.servers, "zero")
            await wait_until_stable(
                lambda: not boxes.servers and not routable_functions(controller)
            )
            controller.activate(["f1"])
            await eventually(lambda: routable_functions(controller) == {"f1"})

    asyncio.run(story())


def test_load_buys_replicas_and_its_end_gives_them_back() -> None:
    async def story() -> None:
        async with controller_and_platform(make_model(1, warm_pool=0)) as (controller, boxes):
            controller.activate(["f0"])
            async with reporting_load(controller, load(11.0, "f0")):
                await wait_until_stable(
                    lambda: len(controller.routing_table.table.functions[0].addresses) == 4
                )
                addresses = controller.routing_table.table.functions[0].addresses
                assert sorted(addresses) == sorted(box.address for box in boxes.servers.values())
            await eventually(lambda: not boxes.servers, "zero")

    asyncio.run(story())


def test_a_minimum_is_kept_without_any_call() -> None:
    async def story() -> None:
        scaling = replace(FAST_SCALING, min_scale=1)
        async with controller_and_platform(make_model(2, warm_pool=0, scaling=scaling)) as (
            controller,
            boxes,
        ):
            await wait_until_stable(
                lambda: routable_functions(controller) == {"f0", "f1"} and len(boxes.servers) == 2
            )

    asyncio.run(story())


def test_an_address_leaves_the_table_before_its_function_is_detached() -> None:
    seen: list[bool] = []

    def watching(feed: RoutingTablePublisher) -> Callable[[web.Request], Awaitable[None]]:
        async def watch(request: web.Request) -> None:
            if request.method == "DELETE":
                seen.append(any(entry.addresses for entry in feed.table.functions))

        return watch

    async def story() -> None:
        async with controller_and_platform(make_model(1, warm_pool=0)) as (controller, boxes):
            boxes.fault_handlers = [watching(controller.routing_table)]
            controller.routing_table.n_watchers = 1
            controller.activate(["f0"])
            await eventually(lambda: bool(routable_functions(controller)))
            (box,) = boxes.servers.values()
            controller.add_load_report(LoadReport("r"))
            await eventually(lambda: not routable_functions(controller))
            assert box.calls == ["PUT f0"]  # calls on their way still find it
            await eventually(lambda: not boxes.servers)
            assert box.calls == ["PUT f0", "DELETE f0"]
            assert seen == [False]

    asyncio.run(story())


def test_a_function_that_is_wanted_again_while_it_leaves_stays() -> None:
    async def story() -> None:
        timing = replace(TIMING, drain_s=60.0)
        async with controller_and_platform(make_model(1, warm_pool=0), timing=timing) as (
            controller,
            boxes,
        ):
            controller.routing_table.n_watchers = 1
            controller.activate(["f0"])
            await eventually(lambda: bool(routable_functions(controller)))
            (box,) = boxes.servers.values()
            controller.add_load_report(LoadReport("r"))
            await eventually(lambda: not routable_functions(controller))
            controller.activate(["f0"])
            assert routable_functions(controller) == {"f0"}
            assert box.calls == ["PUT f0"]
            assert list(boxes.servers) == [box.id]

    asyncio.run(story())


def test_a_restarted_control_keeps_what_it_finds() -> None:
    async def story() -> None:
        boxes, model = FakePlatform(), make_model(3, warm_pool=1)
        try:
            async with running_controller(model, boxes) as first:
                first.activate(["f0", "f2"])
                await eventually(lambda: routable_functions(first) == {"f0", "f2"})
                await wait_until_stable(lambda: first.fleet.n_generic() == 1)
                before = {e.spec.id: e.addresses for e in first.routing_table.table.functions}
            created = boxes.n_created
            async with running_controller(model, boxes) as second:
                assert {
                    e.spec.id: e.addresses for e in second.routing_table.table.functions
                } == before
                async with reporting_load(second, load(1.0, "f0", "f2")):
                    await wait_until_stable(lambda: routable_functions(second) == {"f0", "f2"})
                    assert boxes.n_created == created
                    second.activate(["f1"])
                    await eventually(lambda: routable_functions(second) == {"f0", "f1", "f2"})
                await eventually(lambda: len(boxes.servers) == 1, "only the pool")
            calls = [call for box in boxes.servers.values() for call in box.calls]
            assert "PUT f0" not in calls[1:]
        finally:
            await boxes.close()

    asyncio.run(story())


def test_functions_of_an_earlier_plan_are_detached() -> None:
    async def story() -> None:
        boxes, model = FakePlatform(), make_model(1, warm_pool=1)
        body = {"store": "/store", "model_digest": "sha256:9", "layers": [7], "experts": [0]}
        box = SandboxServer("left", functions={"old": body})
        try:
            await boxes.start_sandbox(box, model.template)
            async with running_controller(model, boxes) as controller:
                await eventually(lambda: controller.fleet.n_generic() == 1)
                assert box.calls == ["DELETE old"]
                assert list(boxes.servers) == ["left"]
        finally:
            await boxes.close()

    asyncio.run(story())


def test_a_lost_sandbox_is_replaced() -> None:
    async def story() -> None:
        async with controller_and_platform(make_model(1, warm_pool=0)) as (controller, boxes):
            controller.activate(["f0"])
            async with reporting_load(controller, load(1.0, "f0")):
                await eventually(lambda: bool(routable_functions(controller)))
                (lost,) = boxes.servers
                await boxes.kill(lost)
                await eventually(lambda: bool(boxes.sandboxes_with("f0")), "a replacement")
                assert lost not in boxes.servers
                await eventually(lambda: bool(routable_functions(controller)))

    asyncio.run(story())


def test_a_broken_platform_is_asked_less_and_less() -> None:
    async def story() -> None:
        async with controller_and_platform(make_model(1, warm_pool=1)) as (controller, boxes):
            await eventually(lambda: controller.fleet.n_generic() == 1)
            boxes.is_broken = True
            controller.activate(["f0"])
            before = boxes.n_created
            await asyncio.sleep(20 * TIMING.tick_s)  # 20 s of its clock
            assert boxes.n_created - before <= 10
            boxes.is_broken = False
            await eventually(lambda: controller.fleet.n_generic() == 1, "the pool again")

    asyncio.run(story())


def test_popular_functions_come_first() -> None:
    async def story() -> None:
        model = make_model(3, capacity=3, warm_pool=1)
        async with controller_and_platform(model) as (controller, boxes):
            await eventually(lambda: controller.fleet.n_generic() == 1)
            controller.add_load_report(load(0.0, "f2", rows=100))
            controller.add_load_report(load(0.0, "f1", rows=10))
            (box,) = boxes.servers.values()
            controller.activate(["f0", "f1", "f2"])
            await eventually(lambda: len(routable_functions(controller)) == 3)
            assert box.calls == ["PUT f2", "PUT f1", "PUT f0"]

    asyncio.run(story())


async def _refuses_to_attach(request: web.Request) -> web.Response | None:
    return error_response(409, "attach_refused") if request.method == "PUT" else None


async def _returns_invalid_response(request: web.Request) -> web.Response | None:
    return web.Response(body=b"\x00\x01<html>") if request.method == "PUT" else None


async def _hangs_on_attach(request: web.Request) -> web.Response | None:
    if request.method == "PUT":
        await asyncio.Event().wait()
    return None


async def _loses_attached_function(request: web.Request) -> web.Response | None:
    return web.json_response({}, status=201) if request.method == "PUT" else None


_LISTED: WeakSet[web.Application] = WeakSet()


async def _lists_function_never_attached(request: web.Request) -> web.Response | None:
    if request.method != "GET":
        return None
    foreign = {"id": "x", "layers": [0], "experts": [0], "model_digest": "m", "size_bytes": 1}
    was_listed = request.app in _LISTED
    _LISTED.add(request.app)
    return web.json_response({"functions": [foreign] * was_listed})


async def _lists_invalid_functions(request: web.Request) -> web.Response | None:
    return web.json_response({"functions": [7]}) if request.method == "GET" else None


async def _lists_a_function_twice(request: web.Request) -> web.Response | None:
    body = {"id": "f0", "layers": [0], "experts": [0, 1], "model_digest": "m", "size_bytes": 1}
    answer = web.json_response({"functions": [body, body]})
    return answer if request.method == "GET" else None


async def _never_responds(request: web.Request) -> web.Response | None:
    await asyncio.Event().wait()
    return None


async def _requires_another_token(request: web.Request) -> web.Response | None:
    return error_response(401, "unauthorized")


FAULTS = [
    _refuses_to_attach,
    _returns_invalid_response,
    _hangs_on_attach,
    _loses_attached_function,
    _lists_function_never_attached,
    _lists_invalid_functions,
    _lists_a_function_twice,
    _never_responds,
    _requires_another_token,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__.strip("_"))
def test_a_sandbox_that_misbehaves_is_ejected_and_replaced(
    fault: Callable[[web.Request], Awaitable[web.Response | None]],
) -> None:
    async def story() -> None:
        boxes, model = FakePlatform(), make_model(1, warm_pool=0)
        boxes.fault_handlers = [fault]
        try:
            async with running_controller(model, boxes) as controller:
                controller.activate(["f0"])
                async with reporting_load(controller, load(1.0, "f0")):
                    await eventually(lambda: boxes.sandboxes_with("f0") == ["box2"], "replaced")
                    await eventually(lambda: "box1" not in boxes.servers, "ejected")
                    await eventually(lambda: routable_functions(controller) == {"f0"})
                    (address,) = controller.routing_table.table.functions[0].addresses
                    assert address == boxes.servers["box2"].address
        finally:
            await boxes.close()

    asyncio.run(story())


def test_where_memory_is_short_the_least_lately_used_makes_room() -> None:
    async def story() -> None:
        model = make_model(3, capacity=8, warm_pool=0, memory_limit=2)
        async with controller_and_platform(model) as (controller, boxes):
            controller.activate(["f0"])
            await eventually(lambda: routable_functions(controller) == {"f0"})
            controller.activate(["f1"])
            async with reporting_load(controller, load(1.0, "f1")):
                await eventually(lambda: routable_functions(controller) == {"f0", "f1"})
                controller.activate(["f2"])
                await eventually(lambda: routable_functions(controller) == {"f1", "f2"})
                assert not boxes.sandboxes_with("f0")

    asyncio.run(story())


def test_one_that_made_room_comes_back_when_it_is_called_again() -> None:
    async def story() -> None:
        model = make_model(2, warm_pool=0, memory_limit=1)
        async with controller_and_platform(model) as (controller, _):
            for function in ("f0", "f1", "f0", "f1"):
                await eventually(partial(activates_alone, controller, function))

    asyncio.run(story())


def test_callers_wait_while_all_that_has_room_is_in_use_and_are_told_of() -> None:
    async def story() -> None:
        model = make_model(2, warm_pool=0, memory_limit=1)
        async with controller_and_platform(model) as (controller, boxes):
            controller.activate(["f0"])
            async with reporting_load(controller, load(1.0, "f0")):
                await eventually(lambda: routable_functions(controller) == {"f0"})
                controller.activate(["f1"])
                told = "memory: 1 functions wait for memory, 0 fit in no sandbox"
                await wait_until_stable(
                    lambda: routable_functions(controller) == {"f0"} and controller.failure == told
                )
                assert boxes.n_created == 1
            await eventually(partial(activates_alone, controller, "f1"))
            await eventually(lambda: controller.failure == "")

    asyncio.run(story())


def test_a_sandbox_takes_no_more_than_it_says_that_it_may() -> None:
    async def story() -> None:
        async with controller_and_platform(make_model(4, capacity=8, warm_pool=0)) as (
            controller,
            boxes,
        ):
            boxes.memory_limit = 2
            controller.activate([f"f{index}" for index in range(4)])
            await eventually(lambda: len(routable_functions(controller)) == 4)
            assert [len(box.functions) for box in boxes.servers.values()] == [2, 2]
            assert all(len(box.calls) == 2 for box in boxes.servers.values())

    asyncio.run(story())


def test_a_sandbox_without_memory_for_one_more_serves_on_and_the_other_goes_elsewhere() -> None:
    async def full(request: web.Request) -> web.Response | None:
        is_second = request.method == "PUT" and request.path.endswith("f1")
        return error_response(503, "out_of_memory") if is_second else None

    async def story() -> None:
        async with controller_and_platform(make_model(2, capacity=8, warm_pool=0)) as (
            controller,
            boxes,
        ):
            boxes.fault_handlers = [full]
            controller.activate(["f0"])
            await eventually(lambda: routable_functions(controller) == {"f0"})
            (first,) = boxes.servers
            controller.activate(["f1"])
            await eventually(lambda: routable_functions(controller) == {"f0", "f1"})
            assert boxes.sandboxes_with("f0") == [first]
            assert boxes.sandboxes_with("f1") != [first]

    asyncio.run(story())


def test_no_sandbox_after_another_is_created_for_what_fits_in_none() -> None:
    async def story() -> None:
        model = make_model(1, warm_pool=0, size_bytes=2)
        async with controller_and_platform(model) as (controller, boxes):
            boxes.memory_limit = 1
            controller.activate(["f0"])
            told = "memory: 0 functions wait for memory, 1 fit in no sandbox"
            await wait_until_stable(lambda: controller.failure == told)
            assert boxes.n_created == 1

    asyncio.run(story())
