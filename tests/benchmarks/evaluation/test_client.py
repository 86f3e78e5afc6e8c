import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from benchmarks.evaluation.client import TenantEndpoint, WorkloadResult, run_workload
from benchmarks.evaluation.tasks import Task
from benchmarks.evaluation.workload import Workload, WorkloadRequest

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
MODEL = "bench"


@asynccontextmanager
async def _serving(handler: Handler) -> AsyncIterator[TenantEndpoint]:
    app = web.Application()
    app.router.add_post("/v1/completions", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    try:
        yield TenantEndpoint(f"http://127.0.0.1:{port}", MODEL, {"Authorization": "Bearer key"})
    finally:
        await runner.cleanup()


def _streaming(*events: Any, headers: dict[str, str] | None = None) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        for event in events:
            text = event if isinstance(event, str) else json.dumps(event)
            await response.write(f"data: {text}\n\n".encode())
        return response

    return handle


def _chunk(text: str) -> dict[str, Any]:
    return {"choices": [{"text": text, "index": 0}], "usage": None}


def _usage(n_tokens: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"completion_tokens": n_tokens}}


def _closed_loop(tenants: int, requests: int) -> Workload:
    requests_of_all = [
        WorkloadRequest(tenant, number, Task("x", f"{tenant}-{number}", 3), None)
        for tenant in range(tenants)
        for number in range(requests)
    ]
    return Workload("test", tuple(requests_of_all))


def _run(handler: Handler, workload: Workload) -> WorkloadResult:
    async def run() -> WorkloadResult:
        async with _serving(handler) as endpoint:
            return await run_workload(
                workload, [endpoint] * workload.n_tenants, progress=lambda: None
            )

    return asyncio.run(run())


def test_assembles_streamed_response() -> None:
    handler = _streaming(
        _chunk("a"), _chunk("bc"), _usage(3), "[DONE]", headers={"X-FaaSMoE-Cold-Start": "0.250"}
    )
    (response,) = _run(handler, _closed_loop(1, 1)).results
    assert (response.text, response.n_tokens, response.queued_s, response.error) == (
        "abc",
        3,
        0.25,
        "",
    )
    assert 0 < response.ttft_s <= response.total_s
    assert response.tpot_s == (response.total_s - response.ttft_s) / 2


def test_sends_greedy_request_with_headers_of_tenant() -> None:
    requests: list[tuple[dict[str, Any], str]] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        requests.append((await request.json(), request.headers["Authorization"]))
        return await _streaming(_chunk("x"), _usage(3), "[DONE]")(request)

    _run(handle, _closed_loop(1, 1))
    ((body, key),) = requests
    assert key == "Bearer key"
    assert (body["model"], body["prompt"], body["max_tokens"]) == (MODEL, "0-0", 3)
    assert (body["temperature"], body["ignore_eos"], body["stream"]) == (0, True, True)


def test_error_status_is_a_failure() -> None:
    async def handle(_: web.Request) -> web.StreamResponse:
        return web.Response(status=429, text="too many")

    (response,) = _run(handle, _closed_loop(1, 1)).results
    assert response.error == "status 429: too many"


def test_error_in_mid_stream_is_a_failure() -> None:
    handler = _streaming(_chunk("a"), {"error": {"message": "it broke"}}, "[DONE]")
    (response,) = _run(handler, _closed_loop(1, 1)).results
    assert response.error == "it broke"


def test_truncated_response_is_a_failure() -> None:
    (response,) = _run(_streaming(_chunk("a"), _usage(2)), _closed_loop(1, 1)).results
    assert response.error == "got 2 tokens, expected 3"


def test_unreachable_server_is_a_failure() -> None:
    endpoint = TenantEndpoint("http://127.0.0.1:1", MODEL)
    outcome = asyncio.run(run_workload(_closed_loop(1, 1), [endpoint], progress=lambda: None))
    assert outcome.results[0].error.startswith("ClientConnectorError")


def test_closed_loop_tenant_sends_one_request_at_a_time() -> None:
    running: dict[str, int] = {}
    max_per_tenant, max_total = 0, 0
    all_running = asyncio.Event()

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal max_per_tenant, max_total
        tenant = (await request.json())["prompt"].partition("-")[0]
        running[tenant] = running.get(tenant, 0) + 1
        max_per_tenant = max(max_per_tenant, running[tenant])
        max_total = max(max_total, sum(running.values()))
        if max_total == 3:
            all_running.set()
        await all_running.wait()
        running[tenant] -= 1
        return await _streaming(_chunk("x"), _usage(3), "[DONE]")(request)

    outcome = _run(handle, _closed_loop(3, 4))
    assert [result.error for result in outcome.results] == [""] * 12
    assert (max_per_tenant, max_total) == (1, 3)


def test_sends_at_workload_times_and_lasts_for_its_duration() -> None:
    sent_s: list[float] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        sent_s.append(asyncio.get_running_loop().time())
        return await _streaming(_chunk("x"), _usage(3), "[DONE]")(request)

    requests = tuple(
        WorkloadRequest(0, i, Task("x", "x", 3), at_s) for i, at_s in enumerate((0.0, 0.2))
    )
    started_s = time.monotonic()
    outcome = _run(handle, Workload("test", requests, duration_s=2.0))
    assert sent_s[1] - started_s >= 0.2
    assert outcome.time_s >= 2.0
    assert 0.2 <= outcome.busy_s < outcome.time_s
