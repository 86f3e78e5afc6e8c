"""The control API of many models over HTTP, each authorised by its own token."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from fake_platform import controller_and_platform, eventually, make_model, routable_functions

from faasmoe_operator.control.api import make_machine_app, make_models_app, render_models_metrics
from faasmoe_operator.control.api import status as exposition
from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.machine_memory import MemoryPool

TOKENS = {("team-a", "chat"): "token-a", ("team-b", "chat"): "token-b"}


class ModelsApi:
    """An API of two models that have the same name in two namespaces."""

    def __init__(self, controllers: dict[tuple[str, str], Controller]) -> None:
        self.controllers = controllers
        self.http: aiohttp.ClientSession

    def lookup(self, namespace: str, name: str) -> tuple[Controller, str] | None:
        key = (namespace, name)
        controller = self.controllers.get(key)
        return None if controller is None else (controller, TOKENS[key])

    async def request(
        self, path: str, *, token: str = "", method: str = "GET", body: Any = None
    ) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with self.http.request(method, path, json=body, headers=headers) as response:
            is_json = response.content_type == "application/json"
            return response.status, await (response.json() if is_json else response.text())


@asynccontextmanager
async def running_models_api() -> AsyncIterator[ModelsApi]:
    async with AsyncExitStack() as stack:
        controllers = {
            key: (
                await stack.enter_async_context(controller_and_platform(make_model(warm_pool=0)))
            )[0]
            for key in TOKENS
        }
        running = ModelsApi(controllers)

        async def health(_: web.Request) -> web.Response:
            return web.json_response({"status": "ok"})

        app = make_models_app(running.lookup, extra_routes=[web.get("/healthz", health)])
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        running.http = await stack.enter_async_context(
            aiohttp.ClientSession(f"http://{host}:{port}")
        )
        yield running


def body(*functions: str, **more: Any) -> dict[str, Any]:
    return {"router": "r", "sent_at_s": time.time(), "functions": list(functions), **more}


def test_an_activation_request_reaches_only_the_model_of_its_path() -> None:
    async def scenario() -> None:
        async with running_models_api() as running:
            path = "/models/team-b/chat/v1/wake"
            status, _ = await running.request(path, token="token-b", method="POST", body=body("f1"))
            assert status == 202
            first, second = running.controllers.values()
            await eventually(lambda: routable_functions(second) == {"f1"})
            assert routable_functions(first) == set()
            _, status_body = await running.request("/models/team-b/chat/v1/status", token="token-b")
            assert status_body["epoch"] == second.routing_table.epoch

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("path", "token"),
    [
        ("/models/team-a/chat/v1/status", ""),
        ("/models/team-a/chat/v1/status", "token-b"),
        ("/models/team-a/other/v1/status", "token-a"),
        ("/models/team-c/chat/v1/status", "token-a"),
        ("/models/team-a/chat/v1/dance", "token-b"),
        ("/models/team-a", "token-a"),
        ("/models/", "token-a"),
        ("/models/team-a%2Fchat/v1/status", "token-b"),
    ],
)
def test_an_unknown_model_is_rejected_like_a_wrong_token(path: str, token: str) -> None:
    expected = {
        "error": {
            "code": "unauthorized",
            "message": "authorization: expected the bearer token",
            "field": "authorization",
        }
    }

    async def scenario() -> None:
        async with running_models_api() as running:
            assert await running.request(path, token=token) == (401, expected)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/models/team-a/chat/v1/dance", 404),
        ("POST", "/models/team-a/chat/v1/table", 405),
        ("GET", "/v1/status", 404),
        ("GET", "/healthz", 200),
    ],
)
def test_other_paths_keep_their_status(method: str, path: str, status: int) -> None:
    async def scenario() -> None:
        async with running_models_api() as running:
            assert (await running.request(path, token="token-a", method=method))[0] == status

    asyncio.run(scenario())


def test_a_removed_model_is_unknown_and_its_stream_ends() -> None:
    async def scenario() -> None:
        async with running_models_api() as running:
            headers = {"Authorization": "Bearer token-a"}
            path = "/models/team-a/chat/v1/table"
            async with running.http.get(path, headers=headers) as response:
                assert b"snapshot" in await response.content.readline()
                running.controllers.pop(("team-a", "chat")).routing_table.close()
                assert await response.content.read() == b""
            assert (await running.request(path, token="token-a"))[0] == 401

    asyncio.run(scenario())


def test_routers_report_the_tenants_key_counts() -> None:
    async def scenario() -> None:
        async with running_models_api() as running:
            path, (controller, _) = "/models/team-a/chat/v1/load", running.controllers.values()
            known = {"functions": {}, "interval_s": 1.0, "held": 0, "local": 0}

            async def report(router: str, **more: Any) -> int:
                report_body = body() | known | {"router": router} | more
                return (
                    await running.request(path, token="token-a", method="POST", body=report_body)
                )[0]

            revision = controller.revision
            assert await report("r1") == 204
            assert controller.load_reports.tenant_key_counts(controller.clock()) is None
            assert await report("r1", tenants={"acme": 2, "beta": 0}) == 204
            assert controller.revision > revision
            assert await report("r2", tenants={"acme": 1}) == 204
            assert controller.load_reports.tenant_key_counts(controller.clock()) == {
                "acme": 1,
                "beta": 0,
            }
            invalid_tenants: list[Any] = [
                {"acme": -1},
                {"acme": "2"},
                {"Not A Name": 1},
                {"x" * 64: 1},
                {f"t{index}": 1 for index in range(65)},
                [],
            ]
            for wrong in invalid_tenants:
                assert await report("r1", tenants=wrong) == 422
            assert controller.load_reports.tenant_key_counts(controller.clock()) == {
                "acme": 1,
                "beta": 0,
            }

    asyncio.run(scenario())


def test_metrics_of_all_models_are_exported_in_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with running_models_api() as running:
            _, second = running.controllers.values()
            second.activate(["f0"])
            await eventually(lambda: routable_functions(second) == {"f0"})
            text = render_models_metrics(running.controllers.items()).decode()
            sample = 'faasmoe_control_activation_requests_total{{model="chat",namespace="{}"}} {}'
            assert sample.format("team-a", "0.0") in text
            assert sample.format("team-b", "1.0") in text
            assert text.count("# TYPE faasmoe_control_activation_requests_total counter") == 1
            assert 'le="+Inf",model="chat",namespace="team-b"' in text
            assert "faasmoe_control_models_not_exported 0.0" in text
            monkeypatch.setattr(exposition, "MAX_MODELS", 1)
            text = render_models_metrics(running.controllers.items()).decode()
            assert "team-b" not in text
            assert "faasmoe_control_models_not_exported 1.0" in text

    asyncio.run(scenario())


def router_report(**fields: Any) -> dict[str, Any]:
    report = {
        "name": "a/0",
        "size_bytes": 40,
        "idle_s": 0.0,
        "is_running": False,
        "is_wanted": True,
        "is_pinned": False,
        "is_ready": False,
        "waiting_s": 0.0,
    }
    return {"routers": [{**report, **fields}]}


@asynccontextmanager
async def running_machine_api(memory: MemoryPool | None) -> AsyncIterator[ModelsApi]:
    """Run the API of one model of a machine, named tiny, whose token is `secret`."""
    async with AsyncExitStack() as stack:
        context = controller_and_platform(make_model(warm_pool=0))
        controller, _ = await stack.enter_async_context(context)
        running = ModelsApi({})
        app = make_machine_app(
            {"tiny": controller}, token="secret", memory=memory, n_processes=lambda: 3
        )
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        session = aiohttp.ClientSession(f"http://{host}:{port}")
        running.http = await stack.enter_async_context(session)
        yield running


def test_machine_has_the_routes_and_metrics_of_each_model() -> None:
    async def check() -> None:
        async with running_machine_api(None) as running:
            path = "/models/local/tiny/v1/status"
            status, body = await running.request(path, token="secret")
            assert (status, body["model"]) == (200, "tiny")
            assert (await running.request(path, token="other"))[0] == 401
            assert (await running.request("/models/local/b/v1/status", token="secret"))[0] == 401
            assert (await running.request("/healthz"))[0] == 200
            _, text = await running.request("/metrics")
            assert 'faasmoe_control_routing_table_watchers{model="tiny",namespace="local"}' in text
            assert "faasmoe_control_sandbox_processes 3.0" in text

    asyncio.run(check())


def test_machine_says_which_routers_fit_its_memory() -> None:
    """One has the memory and is in use; a second one waits, though it would fit alone."""
    running_router = router_report(is_running=True)["routers"]
    body_of_two = {"routers": [*running_router, *router_report(name="b/0")["routers"]]}

    async def check() -> None:
        memory = MemoryPool(60, clock=time.monotonic)
        for pool, expected in ((None, ["a/0", "b/0"]), (memory, ["a/0"])):
            async with running_machine_api(pool) as running:
                status, body = await running.request(
                    "/routers", token="secret", method="POST", body=body_of_two
                )
                assert (status, sorted(body["may_run"])) == (200, expected)

    asyncio.run(check())


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "routers"),
        ({"routers": [1]}, "routers.0"),
        (router_report(name=""), "routers.0.name"),
        (router_report(size_bytes=-1), "routers.0.size_bytes"),
        (router_report(idle_s="1"), "routers.0.idle_s"),
        (router_report(is_running=1), "routers.0.is_running"),
        (router_report(is_ready=1), "routers.0.is_ready"),
        (router_report(waiting_s=-1.0), "routers.0.waiting_s"),
        (router_report(other=1), "routers.0.other"),
    ],
)
def test_invalid_reports_of_routers_are_refused(body: object, field: str) -> None:
    async def check() -> None:
        async with running_machine_api(None) as running:
            post: dict[str, Any] = {"method": "POST", "body": body}
            assert (await running.request("/routers", **post))[0] == 401
            status, answer = await running.request("/routers", token="secret", **post)
            assert (status, answer["error"]["field"]) == (422, field)

    asyncio.run(check())


def test_functions_start_with_the_router_of_their_model() -> None:
    async def check() -> None:
        async with running_machine_api(None) as running:
            post: dict[str, Any] = {"token": "secret", "method": "POST"}
            status, _ = await running.request("/warm", body={"model": "tiny"}, **post)
            assert status == 202
            path = "/models/local/tiny/v1/status"
            async with asyncio.timeout(120):
                ready = 0
                while not ready:
                    _, body = await running.request(path, token="secret")
                    ready = sum(function["ready"] for function in body["functions"])
            for body in ({"model": "other"}, {}, {"model": 1}):
                assert (await running.request("/warm", body=body, **post))[0] == 422
            assert (await running.request("/warm", method="POST", body={"model": "tiny"}))[0] == 401

    asyncio.run(check())
