"""The live page over HTTP, with a controller of a fake platform."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import wraps
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from fake_platform import controller_and_platform, eventually, make_model, reporting_load

from faasmoe_contracts.control_messages import FunctionLoad, LoadReport
from faasmoe_contracts.usage import UsageRecord, UsageReport
from faasmoe_operator.control.api import LivePage
from faasmoe_operator.control.api.live_page import MAX_VIEWERS
from faasmoe_operator.control.api.live_view import live_view
from faasmoe_operator.control.controller import Controller

MODEL = "shop/tiny"


def in_event_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a test in an event loop of its own."""

    @wraps(test)
    def run(*args: Any, **options: Any) -> None:
        asyncio.run(test(*args, **options))  # type: ignore[arg-type]

    return run


@asynccontextmanager
async def page(key: str | None = None) -> AsyncIterator[tuple[Controller, aiohttp.ClientSession]]:
    async with controller_and_platform(make_model(3)) as (controller, _):
        app = LivePage(lambda: [(MODEL, controller)], key=key).make_app()
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        async with aiohttp.ClientSession(f"http://{host}:{port}") as http:
            try:
                yield controller, http
            finally:
                await runner.cleanup()


async def read_event(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """Return the next event of a stream, comments skipped."""
    async with asyncio.timeout(120):
        while True:
            line = await response.content.readline()
            assert line, "the stream ended"
            if line.startswith(b"data: "):
                event: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
                return event


@in_event_loop
async def test_the_page_and_all_files_that_it_names_are_served() -> None:
    async with page() as (_, http), http.get("/ui") as response:  # follows the redirect
        assert response.url.path == "/ui/"
        text = await response.text()
        assert response.content_type == "text/html"
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        names = {*re.findall(r'(?:src|href)="([\w.]+)"', text)}
        assert names == {"live.css", "main.js"}
        while names:
            async with http.get(f"/ui/{names.pop()}") as file:
                assert file.status == 200
                names |= set(re.findall(r'from "\./([\w.]+)"', await file.text()))


@in_event_loop
async def test_no_other_file_is_served() -> None:
    async with page() as (_, http):
        for path in ("/ui/../__init__.py", "/ui/%2e%2e%2f__init__.py", "/ui/__init__.py", "/ui/x"):
            async with http.get(path) as response:
                assert response.status == 404


@in_event_loop
async def test_the_stream_follows_the_model() -> None:
    async with page() as (controller, http):
        async with http.get("/ui/models") as response:
            assert await response.json() == {"models": [MODEL]}
        async with http.get("/ui/events", params={"model": MODEL}) as response:
            assert response.content_type == "text/event-stream"
            first = await read_event(response)
            assert first["functions"]["active"] == 0
            assert [cell[:2] for cell in first["functions"]["cells"]] == [[0, 0], [1, 0], [2, 0]]
            name = next(iter(controller.model.functions))
            load = LoadReport("router", {name: FunctionLoad(1.0)})  # idle, it may end unseen
            async with reporting_load(controller, load):
                controller.activate([name])
                while (event := await read_event(response))["functions"]["active"] == 0:
                    pass
            assert event["memory"]["active_bytes"] > 0
            assert {e["kind"] for e in event["events"]} >= {"activated", "sandbox started"}
            assert event["functions"]["shown_at"] is None  # no calls: no cell says which
            assert {cell[3] for cell in event["functions"]["cells"]} == {0}


@in_event_loop
async def test_cells_change_once_enough_tokens_have_passed() -> None:
    async with page() as (controller, _):
        name = next(iter(controller.model.functions))
        controller.activate([name])
        await eventually(lambda: name in controller.fleet.ready_replicas())
        rows = controller.activity.window.settings.min_tokens
        report = LoadReport("router", {name: FunctionLoad(1.0, calls=3, rows=rows)})
        controller.add_load_report(report)
        await eventually(lambda: controller.activity.window.shown_at is not None)
        cells = live_view(controller, with_tenants=False)["functions"]["cells"]
        assert [cell[3] for cell in cells] == [1, 0, 0]


@in_event_loop
async def test_names_of_other_web_sites_are_refused() -> None:
    async with page() as (_, http):
        for host, status in (
            ("evil.example:8000", 403),
            ("127.0.0.1.evil.example", 403),
            ("localhost:8000", 200),
            ("[::1]:8000", 200),
            ("LOCALHOST", 200),
        ):
            async with http.get("/ui/models", headers={"Host": host}) as response:
                assert (host, response.status) == (host, status)


@in_event_loop
async def test_a_page_with_a_key_requires_it() -> None:
    async with page(key="right") as (_, http):
        for path in ("/ui/models", "/ui/events?model=" + MODEL):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "right"}):
                async with http.get(path, headers=headers) as response:
                    assert response.status == 401
        headers = {"Authorization": "Bearer right", "Host": "faasmoe.example"}
        async with http.get("/ui/models", headers=headers) as response:
            assert response.status == 200
        async with http.get("/ui/") as response:
            assert response.status == 200  # asks for the key


@in_event_loop
async def test_tenants_are_shown_to_whoever_has_the_key() -> None:
    for key, headers in ((None, {}), ("right", {"Authorization": "Bearer right"})):
        async with page(key=key) as (controller, http):
            used = {
                "acme": UsageRecord(5, 9, completed=2, expert_gb_seconds=1.5),
                "b": UsageRecord(),
            }
            controller.add_usage_report(UsageReport("0" * 32, 0.0, used))
            async with http.get(f"/ui/events?model={MODEL}", headers=headers) as response:
                event = await read_event(response)
        rows = event["tenants"]
        assert (rows is None) == (key is None)
        if rows is not None:
            assert [row["name"] for row in rows] == ["acme", "b"]
            assert list(rows[0].values()) == ["acme", 2, 5, 9, 1.5]


@in_event_loop
async def test_an_unknown_model_is_named() -> None:
    async with page() as (_, http), http.get("/ui/events?model=other") as response:
        assert response.status == 404
        assert (await response.json())["error"]["message"].startswith("model: got 'other'")


@in_event_loop
async def test_the_number_of_viewers_is_bounded() -> None:
    async with page() as (_, http):
        responses = [
            await http.get("/ui/events", params={"model": MODEL}) for _ in range(MAX_VIEWERS)
        ]
        async with http.get("/ui/events", params={"model": MODEL}) as response:
            assert response.status == 503
        for response in responses:
            response.close()


@pytest.mark.parametrize("method", ["post", "put", "delete"])
@in_event_loop
async def test_the_page_is_read_only(method: str) -> None:
    async with page() as (_, http), http.request(method, "/ui/models") as response:
        assert response.status == 405
