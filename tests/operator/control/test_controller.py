"""The control loop over sandboxes that are real HTTP servers, with an accelerated clock."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakSet

import pytest
from aiohttp import web
from fake_platform import (
    DIGEST,
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

from faasmoe_contracts.control_messages import FunctionLoad, LoadReport
from faasmoe_operator.control.api.status import controller_status
from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.executor import MAX_ATTACHES, MAX_REPLACED_ATTACHES
from faasmoe_operator.control.routing_table import RoutingTablePublisher
from faasmoe_operator.control.sandbox_client import SandboxClient


class SharedByTwo:
    """A pool with one of two generic processes, of which all others are shared by two models."""

    size, n_generic, n_sharing = 2, 1, 2

    def n_models(self, _: str) -> int:
        return 2


def load(concurrency: float, *functions: str, calls: int = 1, rows: int = 1) -> LoadReport:
    return LoadReport("r", {name: FunctionLoad(concurrency, calls, rows) for name in functions})


async def wait_until_stable(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, then check that it holds for ten more ticks."""
    await eventually(condition)
    for _ in range(10):
        await asyncio.sleep(TIMING.tick_s)
        assert condition()


def activates_alone(controller: Controller, function: str) -> bool:
    """Activate a function; return whether it is the only routable one."""
    controller.activate([function])
    return routable_functions(controller) == {function}


@pytest.mark.parametrize("pool", [0, 2])
def test_idle_model_keeps_only_the_warm_pool(pool: int) -> None:
    async def scenario() -> None:
        async with controller_and_platform(make_model(warm_pool=pool)) as (controller, platform):
            await wait_until_stable(
                lambda: len(platform.servers) == controller.fleet.n_generic() == pool
            )
            assert routable_functions(controller) == set()

    asyncio.run(scenario())


def test_status_tells_of_the_pool_that_models_share() -> None:
    async def scenario() -> None:
        platform = FakePlatform()
        async with SandboxClient(token="t") as client:
            shared = Controller(
                make_model(warm_pool=0), platform, client, shared_pool=SharedByTwo()
            )
            own = Controller(make_model(warm_pool=3), platform, client)
            assert (await controller_status(shared))["pool"] == {"size": 2, "ready": 1}
            assert (await controller_status(own))["pool"] == {"size": 3, "ready": 0}
        await platform.close()

    asyncio.run(scenario())


def test_activation_uses_the_warm_pool_immediately() -> None:
    async def scenario() -> None:
        async with controller_and_platform(make_model()) as (controller, platform):
            await eventually(lambda: controller.fleet.n_generic() == 1)
            (server,) = platform.servers.values()
            controller.activate(["f1"])
            assert controller.fleet.n_generic() == 0  # started without waiting for a tick
            await eventually(lambda: routable_functions(controller) == {"f1"})
            assert server.calls == ["PUT f1"]
            await wait_until_stable(lambda: controller.fleet.n_generic() == 1)

    asyncio.run(scenario())


def test_concurrent_activations_attach_each_function_once() -> None:
    async def scenario() -> None:
        async with controller_and_platform(make_model()) as (controller, platform):
            for _ in range(50):
                controller.activate(["f0", "f1", "f2"])
            await eventually(lambda: len(routable_functions(controller)) == 3)
            await wait_until_stable(lambda: len(platform.servers) == 4)
            puts = [call for server in platform.servers.values() for call in server.calls]
            assert sorted(puts) == ["PUT f0", "PUT f1", "PUT f2"]
            text = controller.metrics.render().decode()
            assert 'activations_total{outcome="ready"} 3.0' in text
            assert "faasmoe_control_cold_start_seconds_count 3.0" in text

    asyncio.run(scenario())


def test_functions_share_sandboxes_up_to_their_capacity() -> None:
    async def scenario() -> None:
        async with controller_and_platform(make_model(6, capacity=3, warm_pool=0)) as (
            controller,
            platform,
        ):
            controller.activate([f"f{index}" for index in range(6)])
            await eventually(lambda: len(routable_functions(controller)) == 6)
            assert sorted(len(server.functions) for server in platform.servers.values()) == [3, 3]

    asyncio.run(scenario())


def test_functions_scale_to_zero_without_load() -> None:
    async def scenario() -> None:
        async with controller_and_platform(make_model(warm_pool=0)) as (controller, platform):
            controller.activate(["f0", "f1"])
            await eventually(lambda: len(routable_functions(controller)) == 2)
            controller.add_load_report(load(1.0, "f0", "f1"))
            controller.add_load_report(LoadReport("r"))
            await eventually(lambda: not platform.servers, "zero")
            await wait_until_stable(
                lambda: not platform.servers and not routable_functions(controller)
            )
            controller.activate(["f1"])
            await eventually(lambda: routable_functions(controller) == {"f1"})

    asyncio.run(scenario())


def test_replicas_follow_the_load() -> None:
    async def scenario() -> None:
        async with controller_and_platform(make_model(1, warm_pool=0)) as (controller, platform):
            controller.activate(["f0"])
            async with reporting_load(controller, load(11.0, "f0")):
                await wait_until_stable(
                    lambda: len(controller.routing_table.table.functions[0].addresses) == 4
                )
                addresses = controller.routing_table.table.functions[0].addresses
                assert sorted(addresses) == sorted(
                    server.address for server in platform.servers.values()
                )
            await eventually(lambda: not platform.servers, "zero")

    asyncio.run(scenario())


def test_min_scale_is_kept_without_load() -> None:
    async def scenario() -> None:
        scaling = replace(FAST_SCALING, min_scale=1)
        async with controller_and_platform(make_model(2, warm_pool=0, scaling=scaling)) as (
            controller,
            platform,
        ):
            await wait_until_stable(
                lambda: (
                    routable_functions(controller) == {"f0", "f1"} and len(platform.servers) == 2
                )
            )

    asyncio.run(scenario())


def test_address_is_unpublished_before_its_function_is_detached() -> None:
    was_published: list[bool] = []

    def record_at_detach(
        publisher: RoutingTablePublisher,
    ) -> Callable[[web.Request], Awaitable[None]]:
        async def record(request: web.Request) -> None:
            if request.method == "DELETE":
                was_published.append(any(e.addresses for e in publisher.table.functions))

        return record

    async def scenario() -> None:
        async with controller_and_platform(make_model(1, warm_pool=0)) as (controller, platform):
            platform.fault_handlers = [record_at_detach(controller.routing_table)]
            controller.routing_table.n_watchers = 1
            controller.activate(["f0"])
            await eventually(lambda: bool(routable_functions(controller)))
            (server,) = platform.servers.values()
            controller.add_load_report(LoadReport("r"))
            await eventually(lambda: not routable_functions(controller))
            assert server.calls == ["PUT f0"]  # calls in flight still find it
            await eventually(lambda: not platform.servers)
            assert server.calls == ["PUT f0", "DELETE f0"]
            assert was_published == [False]

    asyncio.run(scenario())


def test_activation_cancels_a_pending_detach() -> None:
    async def scenario() -> None:
        timing = replace(TIMING, drain_s=60.0)
        async with controller_and_platform(make_model(1, warm_pool=0), timing=timing) as (
            controller,
            platform,
        ):
            controller.routing_table.n_watchers = 1
            controller.activate(["f0"])
            await eventually(lambda: bool(routable_functions(controller)))
            (server,) = platform.servers.values()
            controller.add_load_report(LoadReport("r"))
            await eventually(lambda: not routable_functions(controller))
            controller.activate(["f0"])
            assert routable_functions(controller) == {"f0"}
            assert server.calls == ["PUT f0"]
            assert list(platform.servers) == [server.id]

    asyncio.run(scenario())


def test_restarted_controller_adopts_sandboxes_and_functions() -> None:
    async def scenario() -> None:
        platform, model = FakePlatform(), make_model(3, warm_pool=1)
        try:
            async with running_controller(model, platform) as first:
                first.activate(["f0", "f2"])
                await eventually(lambda: routable_functions(first) == {"f0", "f2"})
                await wait_until_stable(lambda: first.fleet.n_generic() == 1)
                before = {e.spec.id: e.addresses for e in first.routing_table.table.functions}
            n_created = platform.n_created
            async with running_controller(model, platform) as second:
                assert {
                    e.spec.id: e.addresses for e in second.routing_table.table.functions
                } == before
                async with reporting_load(second, load(1.0, "f0", "f2")):
                    await wait_until_stable(lambda: routable_functions(second) == {"f0", "f2"})
                    assert platform.n_created == n_created
                    second.activate(["f1"])
                    await eventually(lambda: routable_functions(second) == {"f0", "f1", "f2"})
                await eventually(lambda: len(platform.servers) == 1, "only the pool")
            calls = [call for server in platform.servers.values() for call in server.calls]
            assert "PUT f0" not in calls[1:]
        finally:
            await platform.close()

    asyncio.run(scenario())


def test_functions_of_an_earlier_plan_are_detached() -> None:
    async def scenario() -> None:
        platform, model = FakePlatform(), make_model(1, warm_pool=1)
        body = {"store": "/store", "model_digest": "sha256:9", "layers": [7], "experts": [0]}
        server = SandboxServer("left", functions={"old": body})
        try:
            await platform.start_sandbox(server, model.template)
            async with running_controller(model, platform) as controller:
                await eventually(lambda: controller.fleet.n_generic() == 1)
                assert server.calls == ["DELETE old"]
                assert list(platform.servers) == ["left"]
        finally:
            await platform.close()

    asyncio.run(scenario())


def test_lost_sandbox_is_replaced() -> None:
    async def scenario() -> None:
        async with controller_and_platform(make_model(1, warm_pool=0)) as (controller, platform):
            controller.activate(["f0"])
            async with reporting_load(controller, load(1.0, "f0")):
                await eventually(lambda: bool(routable_functions(controller)))
                (lost,) = platform.servers
                await platform.kill(lost)
                await eventually(lambda: bool(platform.sandboxes_with("f0")), "a replacement")
                assert lost not in platform.servers
                await eventually(lambda: bool(routable_functions(controller)))

    asyncio.run(scenario())


@pytest.mark.parametrize("by_others", [True, False])
def test_a_sandbox_that_others_delete_is_no_warning(
    caplog: pytest.LogCaptureFixture, by_others: bool
) -> None:
    async def scenario() -> str:
        async with controller_and_platform(make_model(1, warm_pool=1)) as (controller, platform):
            await eventually(lambda: controller.fleet.n_generic() == 1)
            (name,) = platform.servers
            if by_others:
                platform.terminate(name)
                await eventually(
                    lambda: any(r.sandbox.terminating for r in controller.fleet.sandboxes)
                )
            await platform.kill(name)
            await eventually(lambda: controller.fleet.n_generic() == 1 and platform.n_created == 2)
            return name

    with caplog.at_level(logging.INFO, logger="faasmoe_operator.control.executor"):
        name = asyncio.run(scenario())
    how, level = ("deleted by others", logging.INFO) if by_others else ("lost", logging.WARNING)
    told = [(r.levelno, r.getMessage()) for r in caplog.records if name in r.getMessage()]
    assert (level, f"sandbox {name} was {how} while Ready") in told
    assert by_others is (logging.WARNING not in {number for number, _ in told})


def test_creation_backs_off_while_the_platform_fails() -> None:
    async def scenario() -> None:
        async with controller_and_platform(make_model(1, warm_pool=1)) as (controller, platform):
            await eventually(lambda: controller.fleet.n_generic() == 1)
            platform.is_broken = True
            controller.activate(["f0"])
            before = platform.n_created
            await asyncio.sleep(20 * TIMING.tick_s)  # 20 s of the controller's clock
            assert platform.n_created - before <= 10
            platform.is_broken = False
            await eventually(lambda: controller.fleet.n_generic() == 1, "the pool again")

    asyncio.run(scenario())


def test_popular_functions_are_attached_first() -> None:
    async def scenario() -> None:
        model = make_model(3, capacity=3, warm_pool=1)
        async with controller_and_platform(model) as (controller, platform):
            await eventually(lambda: controller.fleet.n_generic() == 1)
            controller.add_load_report(load(0.0, "f2", rows=100))
            controller.add_load_report(load(0.0, "f1", rows=10))
            (server,) = platform.servers.values()
            controller.activate(["f0", "f1", "f2"])
            await eventually(lambda: len(routable_functions(controller)) == 3)
            assert server.calls == ["PUT f2", "PUT f1", "PUT f0"]

    asyncio.run(scenario())


def test_functions_of_a_sandbox_are_attached_in_few_calls() -> None:
    n_functions, calls = 2 * MAX_ATTACHES + 1, []

    async def count(request: web.Request) -> web.Response | None:
        if request.method == "PUT":
            calls.append(request.path)
        return None

    async def scenario() -> None:
        model = make_model(n_functions, capacity=n_functions, warm_pool=0)
        async with controller_and_platform(model) as (controller, platform):
            platform.fault_handlers = [count]
            controller.activate([f"f{index}" for index in range(n_functions)])
            await eventually(lambda: len(routable_functions(controller)) == n_functions)
            (server,) = platform.servers.values()
            assert sorted(server.calls) == sorted(f"PUT f{index}" for index in range(n_functions))
            last = server.calls[-1].removeprefix("PUT ")
            assert calls == ["/v1/functions", "/v1/functions", f"/v1/functions/{last}"]

    asyncio.run(scenario())


def test_lost_functions_are_attached_again_a_few_at_a_time() -> None:
    """Routers compute them meanwhile, and need the processors."""
    n_functions, sizes = MAX_REPLACED_ATTACHES + 2, []

    async def count(request: web.Request) -> web.Response | None:
        if request.method == "PUT":
            is_one = not request.path.endswith("/functions")
            sizes.append(1 if is_one else len((await request.json())["functions"]))
        return None

    async def scenario() -> None:
        model = make_model(n_functions, capacity=n_functions, warm_pool=0)
        async with controller_and_platform(model) as (controller, platform):
            platform.fault_handlers = [count, count]
            names = [f"f{index}" for index in range(n_functions)]
            controller.activate(names)
            await eventually(lambda: len(routable_functions(controller)) == n_functions)
            assert sizes == [n_functions]
            (lost,) = platform.servers
            await platform.kill(lost)
            await eventually(lambda: not routable_functions(controller))
            controller.activate(names)
            await eventually(lambda: len(routable_functions(controller)) == n_functions)
            assert sizes[1:] == [MAX_REPLACED_ATTACHES, 2]

    asyncio.run(scenario())


def test_functions_move_on_when_attaching_ends_unexpectedly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attach_all, failures = SandboxClient.attach_all, iter([ValueError("a test")])

    async def fail_once(self: SandboxClient, *args: Any, **kwargs: Any) -> Any:
        for error in failures:
            raise error
        return await attach_all(self, *args, **kwargs)

    async def scenario() -> None:
        model = make_model(MAX_ATTACHES + 2, capacity=MAX_ATTACHES + 2, warm_pool=0)
        async with controller_and_platform(model) as (controller, _):
            controller.activate(list(model.functions))
            await eventually(lambda: routable_functions(controller) == set(model.functions))

    monkeypatch.setattr(SandboxClient, "attach_all", fail_once)
    asyncio.run(scenario())


def test_refused_function_of_a_call_is_placed_elsewhere_and_the_others_stay() -> None:
    async def has_no_room_for_f1(request: web.Request) -> web.Response | None:
        if request.method != "PUT":
            return None
        if not request.path.endswith("/functions"):  # tried again once it has told its limit
            return error_response(503, "out_of_memory") if request.path.endswith("f1") else None
        body = await request.json()
        (server,) = platforms[0].servers.values()
        results: list[dict[str, Any]] = []
        for function in body["functions"]:
            name = function["id"]
            if name == "f1":
                error = {"code": "out_of_memory", "message": "memory: none", "field": "memory"}
                results.append({"id": name, "error": error})
            else:
                server.functions[name] = {"model_digest": DIGEST, **function}
                results.append({"id": name})
        return web.json_response({"functions": results})

    platforms: list[FakePlatform] = []

    async def scenario() -> None:
        model = make_model(3, capacity=8, warm_pool=0)
        async with controller_and_platform(model) as (controller, platform):
            platforms.append(platform)
            platform.fault_handlers = [has_no_room_for_f1]
            controller.activate(["f0", "f1", "f2"])
            await eventually(lambda: routable_functions(controller) == {"f0", "f1", "f2"})
            (first,) = platform.sandboxes_with("f0")
            assert platform.sandboxes_with("f2") == [first]
            (second,) = platform.sandboxes_with("f1")
            assert second != first

    asyncio.run(scenario())


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
    response = web.json_response({"functions": [body, body]})
    return response if request.method == "GET" else None


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
def test_faulty_sandbox_is_replaced(
    fault: Callable[[web.Request], Awaitable[web.Response | None]],
) -> None:
    async def scenario() -> None:
        platform, model = FakePlatform(), make_model(1, warm_pool=0)
        platform.fault_handlers = [fault]
        try:
            async with running_controller(model, platform) as controller:
                controller.activate(["f0"])
                async with reporting_load(controller, load(1.0, "f0")):
                    await eventually(lambda: platform.sandboxes_with("f0") == ["box2"], "replaced")
                    await eventually(lambda: "box1" not in platform.servers, "ejected")
                    await eventually(lambda: routable_functions(controller) == {"f0"})
                    (address,) = controller.routing_table.table.functions[0].addresses
                    assert address == platform.servers["box2"].address
        finally:
            await platform.close()

    asyncio.run(scenario())


def test_evicts_the_least_recently_used_function_under_memory_pressure() -> None:
    async def scenario() -> None:
        model = make_model(3, capacity=8, warm_pool=0, memory_limit=2)
        async with controller_and_platform(model) as (controller, platform):
            controller.activate(["f0"])
            await eventually(lambda: routable_functions(controller) == {"f0"})
            controller.activate(["f1"])
            async with reporting_load(controller, load(1.0, "f1")):
                await eventually(lambda: routable_functions(controller) == {"f0", "f1"})
                controller.activate(["f2"])
                await eventually(lambda: routable_functions(controller) == {"f1", "f2"})
                assert not platform.sandboxes_with("f0")

    asyncio.run(scenario())


def test_evicted_function_is_attached_again_on_activation() -> None:
    async def scenario() -> None:
        model = make_model(2, warm_pool=0, memory_limit=1)
        async with controller_and_platform(model) as (controller, _):
            for function in ("f0", "f1", "f0", "f1"):
                await eventually(partial(activates_alone, controller, function))

    asyncio.run(scenario())


def test_activation_waits_while_all_memory_is_in_use() -> None:
    async def scenario() -> None:
        model = make_model(2, warm_pool=0, memory_limit=1)
        async with controller_and_platform(model) as (controller, platform):
            controller.activate(["f0"])
            async with reporting_load(controller, load(1.0, "f0")):
                await eventually(lambda: routable_functions(controller) == {"f0"})
                controller.activate(["f1"])
                failure = "memory: 1 functions wait for memory, 0 fit in no sandbox"
                await wait_until_stable(
                    lambda: (
                        routable_functions(controller) == {"f0"} and controller.failure == failure
                    )
                )
                assert platform.n_created == 1
            await eventually(partial(activates_alone, controller, "f1"))
            await eventually(lambda: controller.failure == "")

    asyncio.run(scenario())


def test_reported_memory_limit_of_a_sandbox_is_respected() -> None:
    async def scenario() -> None:
        async with controller_and_platform(make_model(4, capacity=8, warm_pool=0)) as (
            controller,
            platform,
        ):
            platform.memory_limit = 2
            controller.activate([f"f{index}" for index in range(4)])
            await eventually(lambda: len(routable_functions(controller)) == 4)
            assert [len(server.functions) for server in platform.servers.values()] == [2, 2]
            assert all(len(server.calls) == 2 for server in platform.servers.values())

    asyncio.run(scenario())


def test_function_is_placed_elsewhere_if_a_sandbox_is_out_of_memory() -> None:
    async def is_full_for_f1(request: web.Request) -> web.Response | None:
        is_second = request.method == "PUT" and request.path.endswith("f1")
        return error_response(503, "out_of_memory") if is_second else None

    async def scenario() -> None:
        async with controller_and_platform(make_model(2, capacity=8, warm_pool=0)) as (
            controller,
            platform,
        ):
            platform.fault_handlers = [is_full_for_f1]
            controller.activate(["f0"])
            await eventually(lambda: routable_functions(controller) == {"f0"})
            (first,) = platform.servers
            controller.activate(["f1"])
            await eventually(lambda: routable_functions(controller) == {"f0", "f1"})
            assert platform.sandboxes_with("f0") == [first]
            assert platform.sandboxes_with("f1") != [first]

    asyncio.run(scenario())


def test_oversized_function_does_not_create_sandboxes_repeatedly() -> None:
    async def scenario() -> None:
        model = make_model(1, warm_pool=0, size_bytes=2)
        async with controller_and_platform(model) as (controller, platform):
            platform.memory_limit = 1
            controller.activate(["f0"])
            failure = "memory: 0 functions wait for memory, 1 fit in no sandbox"
            await wait_until_stable(lambda: controller.failure == failure)
            assert platform.n_created == 1

    asyncio.run(scenario())
