"""The control API over HTTP, with a controller of a fake platform."""

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from fake_platform import (
    DIGEST,
    TOKEN,
    FakePlatform,
    controller_and_platform,
    eventually,
    make_model,
    routable_functions,
)

from faasmoe_contracts.routing_table import RoutingTable
from faasmoe_operator.control.api import make_model_app
from faasmoe_operator.control.controller import Controller


class RunningApi:
    def __init__(
        self, controller: Controller, platform: FakePlatform, http: aiohttp.ClientSession
    ) -> None:
        self.controller = controller
        self.platform = platform
        self.http = http

    async def post(self, path: str, body: object, **options: Any) -> tuple[int, Any]:
        async with self.http.post(path, json=body, **options) as response:
            text = await response.text()
            return response.status, json.loads(text) if text else None

    async def status(self) -> dict[str, Any]:
        async with self.http.get("/v1/status") as response:
            found: dict[str, Any] = await response.json()
            return found

    async def metrics(self) -> str:
        async with self.http.get("/metrics") as response:
            return await response.text()


@asynccontextmanager
async def api(token: str = TOKEN, n_functions: int = 3) -> AsyncIterator[RunningApi]:
    async with controller_and_platform(make_model(n_functions)) as (controller, platform):
        app = make_model_app(controller, token=TOKEN)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        headers = {"Authorization": f"Bearer {token}"}
        async with aiohttp.ClientSession(f"http://{host}:{port}", headers=headers) as http:
            try:
                yield RunningApi(controller, platform, http)
            finally:
                await runner.cleanup()


class TableStreamReader:
    """A table stream, line by line."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response

    async def next(self) -> dict[str, Any]:
        line: dict[str, Any] = json.loads(await self.response.content.readline())
        return line


@asynccontextmanager
async def routing_table_stream(
    running: RunningApi, **known: str
) -> AsyncIterator[TableStreamReader]:
    async with running.http.get("/v1/table", params=known) as response:
        assert response.status == 200
        assert response.content_type == "application/x-ndjson"
        yield TableStreamReader(response)


def load_body(**changes: Any) -> dict[str, Any]:
    functions = {"f0": {"concurrency": 1.5, "calls": 3, "rows": 12}}
    body = {"router": "r1", "sent_at_s": time.time(), "interval_s": 1.0, "functions": functions}
    return {**body, "held": 2, "local": 0, **changes}


def activation_body(*functions: object, **changes: Any) -> dict[str, Any]:
    body = {"router": "r1", "sent_at_s": time.time(), "functions": list(functions)}
    return {**body, **changes}


def test_streams_the_table_and_its_changes() -> None:
    async def scenario() -> None:
        async with api() as running, routing_table_stream(running) as stream:
            first = await stream.next()
            assert (first["kind"], first["epoch"]) == (
                "snapshot",
                running.controller.routing_table.epoch,
            )
            table = RoutingTable.from_json(first["table"])
            assert (table.model_digest, table.version) == (DIGEST, first["version"])
            assert [entry.spec.id for entry in table.functions] == ["f0", "f1", "f2"]
            running.controller.activate(["f1"])
            change = await stream.next()
            assert (change["kind"], change["version"]) == ("change", first["version"] + 1)
            (sandbox,) = running.platform.sandboxes_with("f1")
            address = running.platform.servers[sandbox].address
            assert change["functions"] == [{"id": "f1", "addresses": [address]}]

    asyncio.run(scenario())


def test_a_stream_resumes_from_a_known_version() -> None:
    async def scenario() -> None:
        async with api() as running:
            routing_table = running.controller.routing_table
            known = {"epoch": routing_table.epoch, "version": str(routing_table.version)}
            async with routing_table_stream(running, **known) as stream:
                assert await stream.next() == {"kind": "ping", "version": routing_table.version}
            running.controller.activate(["f0", "f2"])
            await eventually(lambda: len(routable_functions(running.controller)) == 2)
            async with routing_table_stream(running, **known) as stream:
                change = await stream.next()
                assert change["kind"] == "change"
                assert {f["id"] for f in change["functions"]} == {"f0", "f2"}

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "known",
    [
        {"epoch": "another", "version": "1"},
        {"version": "1"},
        {"epoch": "EPOCH", "version": "999"},
        {"epoch": "EPOCH", "version": "-1"},
        {"epoch": "EPOCH", "version": "9" * 5000},
        {"epoch": "EPOCH"},
    ],
)
def test_a_stream_that_cannot_be_resumed_starts_with_a_snapshot(
    known: dict[str, str],
) -> None:
    async def scenario() -> None:
        async with api() as running:
            epoch = running.controller.routing_table.epoch
            given = {key: value.replace("EPOCH", epoch) for key, value in known.items()}
            async with routing_table_stream(running, **given) as stream:
                assert (await stream.next())["kind"] == "snapshot"

    asyncio.run(scenario())


def test_counts_the_watchers_of_the_table() -> None:
    async def scenario() -> None:
        async with api() as running:
            async with routing_table_stream(running) as stream:
                await stream.next()
                assert (await running.status())["followers"] == 1
                assert "faasmoe_control_routing_table_watchers 1.0" in await running.metrics()
            running.controller.activate(["f0"])
            await eventually(lambda: running.controller.routing_table.n_watchers == 0)

    asyncio.run(scenario())


def test_an_activation_request_activates_functions() -> None:
    async def scenario() -> None:
        async with api() as running:
            assert await running.post("/v1/wake", activation_body("f0", "f0", "f2")) == (202, None)
            await eventually(lambda: routable_functions(running.controller) == {"f0", "f2"})

    asyncio.run(scenario())


def test_a_load_report_is_applied() -> None:
    async def scenario() -> None:
        async with api() as running:
            assert await running.post("/v1/load", load_body()) == (204, None)
            status = await running.status()
            assert status["held"] == 2
            function = status["functions"][0]
            assert (function["id"], function["calls"], function["rows"]) == ("f0", 3, 12)
            assert function["idle_s"] is not None

    asyncio.run(scenario())


USE: dict[str, Any] = {
    **dict.fromkeys(("prompt_tokens", "generated_tokens", "completed", "cancelled"), 1),
    **{"failed": 0, "limited": 2, "expert_seconds": 0.5, "expert_gb_seconds": 1},
}


def usage_body(**changes: Any) -> dict[str, Any]:
    return {"book": "a" * 32, "since_s": 10.5, "tenants": {"acme": USE}, **changes}


def test_a_usage_report_returns_the_usage_of_all_routers() -> None:
    async def scenario() -> None:
        async with api() as running:
            assert (await running.post("/v1/usage", usage_body()))[0] == 200
            status, answer = await running.post("/v1/usage", usage_body(book="b" * 32, ends=True))
            assert status == 200
            assert answer["since_s"] == 10.5
            twice = {name: 2 * number for name, number in USE.items()}
            assert answer["tenants"] == {"acme": twice}

    asyncio.run(scenario())


def test_usage_of_too_many_tenants_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("faasmoe_operator.control.usage_ledger.MAX_TENANTS_IN_LEDGER", 1)

    async def scenario() -> None:
        async with api() as running:
            both = {"acme": USE, "beta": USE}
            status, answer = await running.post("/v1/usage", usage_body(tenants=both))
            assert (status, answer["error"]["field"]) == (422, "tenants")
            assert running.controller.usage_ledger.usage_by_tenant == {}

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        pytest.param("load", lambda: load_body(router=""), "router", id="nameless-router"),
        pytest.param("load", lambda: load_body(router="a b"), "router", id="router-with-a-space"),
        pytest.param(
            "load", lambda: load_body(router="r\n"), "router", id="router-with-a-line-end"
        ),
        pytest.param("load", lambda: load_body(router=7), "router", id="router-a-number"),
        pytest.param("load", lambda: load_body(sent_at_s="now"), "sent_at_s", id="time-in-words"),
        pytest.param("load", lambda: load_body(interval_s=0), "interval_s", id="no-interval"),
        pytest.param("load", lambda: load_body(interval_s=61), "interval_s", id="long-interval"),
        pytest.param("load", lambda: load_body(held=-1), "held", id="held-below-zero"),
        pytest.param("load", lambda: load_body(held=1.5), "held", id="half-a-call"),
        pytest.param("load", lambda: load_body(held=True), "held", id="held-true"),
        pytest.param("load", lambda: load_body(more=1), "more", id="unknown-field"),
        pytest.param(
            "load", lambda: load_body(functions=[]), "functions", id="functions-in-a-list"
        ),
        pytest.param(
            "load",
            lambda: load_body(functions={"f9": {"concurrency": 1.0, "calls": 1, "rows": 1}}),
            "functions",
            id="unknown-function",
        ),
        pytest.param(
            "load",
            lambda: load_body(functions={"f0": {"concurrency": -1.0, "calls": 1, "rows": 1}}),
            "functions.f0.concurrency",
            id="concurrency-below-zero",
        ),
        pytest.param(
            "load",
            lambda: load_body(functions={"f0": {"concurrency": 1.0, "calls": 1}}),
            "functions.f0.rows",
            id="no-rows",
        ),
        pytest.param("usage", lambda: usage_body(book="a"), "book", id="short-book"),
        pytest.param("usage", lambda: usage_body(since_s=-1), "since_s", id="since-below-zero"),
        pytest.param(
            "usage",
            lambda: usage_body(tenants={"acme": {**USE, "failed": -1}}),
            "tenants.acme.failed",
            id="use-below-zero",
        ),
        pytest.param(
            "usage",
            lambda: usage_body(tenants={"acme": {"failed": 1}}),
            "tenants.acme.prompt_tokens",
            id="part-of-a-use",
        ),
        pytest.param("wake", lambda: activation_body(), "functions", id="wake-of-nothing"),
        pytest.param(
            "wake", lambda: activation_body("f0", "f9"), "functions", id="wake-of-an-unknown-one"
        ),
        pytest.param(
            "wake", lambda: activation_body("f0", 7), "functions.1", id="wake-of-a-number"
        ),
        pytest.param("wake", lambda: [], "body", id="wake-in-a-list"),
    ],
)
def test_rejects_an_invalid_body_and_changes_nothing(
    path: str, body: Callable[[], Any], field: str
) -> None:
    async def scenario() -> None:
        async with api() as running:
            before = (await running.status())["functions"]
            status, answer = await running.post(f"/v1/{path}", body())
            assert (status, answer["error"]["code"]) == (422, "invalid")
            assert answer["error"]["field"] == field
            assert answer["error"]["message"].startswith(f"{field}: got ")
            assert (await running.status())["functions"] == before
            text = await running.metrics()
            assert 'faasmoe_control_rejected_requests_total{code="invalid"} 1.0' in text
            assert "faasmoe_control_activation_requests_total 0.0" in text
            assert "faasmoe_control_load_reports_total 0.0" in text

    asyncio.run(scenario())


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00", b"[" * 10_000, b'{"held": NaN}'])
def test_rejects_a_body_that_is_not_json(content: bytes) -> None:
    async def scenario() -> None:
        async with api() as running, running.http.post("/v1/load", data=content) as response:
            assert response.status == 422
            assert (await response.json())["error"]["code"] == "invalid"

    asyncio.run(scenario())


def test_rejects_a_body_that_is_too_large() -> None:
    async def scenario() -> None:
        async with api() as running:
            content = io.BytesIO(b" " * ((1 << 20) + 1))
            async with running.http.post("/v1/load", data=content) as response:
                assert response.status == 413
                assert (await response.json())["error"]["code"] == "too_large"

    asyncio.run(scenario())


@pytest.mark.parametrize("token", ["", "wrong", "secre", "secrets", "sécret"])
def test_rejects_a_wrong_token(token: str) -> None:
    async def scenario() -> None:
        async with api(token=token) as running:
            bodies = {"load": load_body(), "usage": usage_body(), "wake": activation_body("f0")}
            for path, body in bodies.items():
                status, answer = await running.post(f"/v1/{path}", body)
                assert (status, answer["error"]["code"]) == (401, "unauthorized")
            for path in ("table", "status"):
                async with running.http.get(f"/v1/{path}") as response:
                    assert response.status == 401
            assert routable_functions(running.controller) == set()
            assert running.controller.load_reports.concurrency(running.controller.clock()) is None
            async with running.http.get("/healthz") as response:
                assert response.status == 200

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/dance", 404, "not_found"),
        ("GET", "/", 404, "not_found"),
        ("GET", "/v1/wake", 405, "bad_method"),
        ("DELETE", "/v1/table", 405, "bad_method"),
    ],
)
def test_responds_to_invalid_requests_with_an_error_object(
    method: str, path: str, status: int, code: str
) -> None:
    async def scenario() -> None:
        async with api() as running, running.http.request(method, path) as response:
            assert response.status == status
            error = (await response.json())["error"]
            assert error["code"] == code
            assert "got " in error["message"]

    asyncio.run(scenario())


def test_status_contains_functions_sandboxes_and_decisions() -> None:
    async def scenario() -> None:
        async with api(n_functions=1) as running:
            running.controller.activate(["f0"])
            await eventually(lambda: routable_functions(running.controller) == {"f0"})
            await eventually(lambda: running.controller.fleet.n_generic() == 1)
            await eventually(lambda: running.controller.autoscalers.phase("f0").value == "Active")
            status = await running.status()
            assert (status["model"], status["epoch"]) == (
                "tiny",
                running.controller.routing_table.epoch,
            )
            (function,) = status["functions"]
            shape = {k: function[k] for k in ("id", "layers", "n_experts", "size_bytes")}
            assert shape == {"id": "f0", "layers": [0], "n_experts": 2, "size_bytes": 1}
            assert (function["state"], function["desired"], function["ready"]) == ("Active", 1, 1)
            assert [s["functions"] for s in status["sandboxes"]] == [["f0"], []]
            assert status["pool"] == {"size": 1, "ready": 1}
            assert status["decisions"] == {"Activated": 1}

    asyncio.run(scenario())


def test_metrics_name_no_function() -> None:
    async def scenario() -> None:
        async with api() as running:
            await running.post("/v1/wake", activation_body("f0"))
            await eventually(lambda: routable_functions(running.controller) == {"f0"})
            await running.post("/v1/load", load_body())
            text = await running.metrics()
            assert "faasmoe_control_activation_requests_total 1.0" in text
            assert "faasmoe_control_load_reports_total 1.0" in text
            assert 'faasmoe_control_scale_decisions_total{reason="Activated"} 1.0' in text
            assert 'faasmoe_control_activations_total{outcome="ready"} 1.0' in text
            assert "faasmoe_control_attach_seconds_count 1.0" in text
            assert 'faasmoe_control_functions{state="Inactive"} 2.0' in text
            assert "faasmoe_control_queue_depth 2.0" in text
            assert "f0" not in text

    asyncio.run(scenario())
