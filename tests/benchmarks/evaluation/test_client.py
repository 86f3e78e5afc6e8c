import asyncio
import json
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


def _piece(text: str) -> dict[str, Any]:
    return {"choices": [{"text": text, "index": 0}], "usage": None}


def _usage(n_tokens: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"completion_tokens": n_tokens}}


def _closed_loop(tenants: int, requests: int) -> Workload:
    made = [
        WorkloadRequest(tenant, number, Task("x", f"{tenant}-{number}", 3), None)
        for tenant in range(tenants)
        for number in range(requests)
    ]
    return Workload("test", tuple(made))


def _run(handler: Handler, workload: Workload) -> WorkloadResult:
    async def run() -> WorkloadResult:
        async with _serving(handler) as endpoint:
            return await run_workload(
                workload, [endpoint] * workload.n_tenants, progress=lambda: None
            )

    return asyncio.run(run())


def test_puts_an_answer_together() -> None:
    handler = _streaming(
        _piece("a"), _piece("bc"), _usage(3), "[DONE]", headers={"X-FaaSMoE-Cold-Start": "0.250"}
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


def test_asks_for_a_whole_greedy_answer_with_the_tenants_headers() -> None:
    asked: list[tuple[dict[str, Any], str]] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        asked.append((await request.json(), request.headers["Authorization"]))
        return await _streaming(_piece("x"), _usage(3), "[DONE]")(request)

    _run(handle, _closed_loop(1, 1))
    ((body, key),) = asked
    assert key == "Bearer key"
    assert (body["model"], body["prompt"], body["max_tokens"]) == (MODEL, "0-0", 3)
    assert (body["temperature"], body["ignore_eos"], body["stream"]) == (0, True, True)


def test_a_refusal_is_a_failure() -> None:
    async def handle(_: web.Request) -> web.StreamResponse:
        return web.Response(status=429, text="too many")

    (response,) = _run(handle, _closed_loop(1, 1)).results
    assert response.error == "status 429: too many"


def test_an_error_in_mid_stream_is_a_failure() -> None:
    handler = _streaming(_piece("a"), {"error": {"message": "it broke"}}, "[DONE]")
    (response,) = _run(handler, _closed_loop(1, 1)).results
    assert response.error == "it broke"


def test_an_answer_of_too_few_tokens_is_a_failure() -> None:
    (response,) = _run(_streaming(_piece("a"), _usage(2)), _closed_loop(1, 1)).results
    assert response.error == "got 2 tokens, expected 3"


def test_a_server_that_is_gone_is_a_failure() -> None:
    endpoint = TenantEndpoint("http://127.0.0.1:1", MODEL)
    played = asyncio.run(run_workload(_closed_loop(1, 1), [endpoint], progress=lambda: None))
    assert played.results[0].error.startswith("ClientConnectorError")


def test_a_tenant_waits_for_its_answer_while_others_ask() -> None:
    running: dict[str, int] = {}
    most_of_one, most = 0, 0
    everyone = asyncio.Event()

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal most_of_one, most
        tenant = (await request.json())["prompt"].partition("-")[0]
        running[tenant] = running.get(tenant, 0) + 1
        most_of_one, most = max(most_of_one, running[tenant]), max(most, sum(running.values()))
        if most == 3:
            everyone.set()
        await everyone.wait()
        running[tenant] -= 1
        return await _streaming(_piece("x"), _usage(3), "[DONE]")(request)

    played = _run(handle, _closed_loop(3, 4))
    assert [answer.error for answer in played.results] == [""] * 12
    assert (most_of_one, most) == (1, 3)


def test_sends_at_the_times_that_the_workload_names_and_stays_to_its_end() -> None:
    sent_s: list[float] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        sent_s.append(asyncio.get_running_loop().time())
        return await _streaming(_piece("x"), _usage(3), "[DONE]")(request)

    requests = tuple(
        WorkloadRequest(0, i, Task("x", "x", 3), at_s) for i, at_s in enumerate((0.0, 0.2))
    )
    played = _run(handle, Workload("test", requests, duration_s=0.4))
    assert sent_s[1] - sent_s[0] >= 0.15
    assert played.time_s >= 0.4 > played.busy_s
