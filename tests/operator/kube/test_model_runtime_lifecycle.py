"""Lifecycle of one model on Kubernetes, with real sandbox processes, a real store and HTTP."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from fake_cluster import NAMESPACE, FakeCluster, ProcessPodRunner, running_cluster
from fake_platform import eventually
from model_contexts import make_context
from sandbox_processes import PreparedStore

from faasmoe_contracts.routing_table import RoutingTable
from faasmoe_operator.control.api import make_models_app
from faasmoe_operator.kube import model_runtime
from faasmoe_operator.kube.manifests import ModelContext
from faasmoe_operator.kube.manifests.names import FUNCTION_LABEL, POOL_LABEL
from faasmoe_operator.kube.model_runtime import RuntimeDependencies, RuntimeManager
from faasmoe_operator.kube.store_summary import StoreSummary
from faasmoe_operator.kube.types import ModelKey
from faasmoe_router.checkpoint.termination_message import success_message

DEADLINE_S = 120.0
KEY = ModelKey(NAMESPACE, "tiny")
SPEC = {
    "granularity": {"expertsPerFunction": 2},
    "experts": {
        "device": "cpu",
        "warmPool": 0,
        "scaling": {
            "windowSeconds": 6,
            "panicWindowPercentage": 20,
            "scaleToZeroGracePeriodSeconds": 0,
        },
    },
}


class OperatorHarness:
    """The parts of an operator that routers see: runtimes and the control API."""

    def __init__(self, runtimes: RuntimeManager, http: aiohttp.ClientSession) -> None:
        self.runtimes = runtimes
        self._http = http

    async def post(self, verb: str, **body: Any) -> int:
        whole = {"router": "r", "sent_at_s": time.time(), **body}
        path = f"/models/{KEY.namespace}/{KEY.name}/v1/{verb}"
        async with self._http.post(path, json=whole) as response:
            return response.status

    async def report(self, **concurrency: float) -> None:
        functions = {
            name: {"concurrency": load, "calls": 1, "rows": 1} for name, load in concurrency.items()
        }
        body = {"interval_s": 1.0, "functions": functions, "held": 0, "local": 0}
        assert await self.post("load", **body) == 204

    async def table(self) -> RoutingTable:
        async with self._http.get(f"/models/{KEY.namespace}/{KEY.name}/v1/table") as response:
            assert response.status == 200
            return RoutingTable.from_json(json.loads(await response.content.readline())["table"])


@asynccontextmanager
async def operator(made: FakeCluster, ctx: ModelContext) -> AsyncIterator[OperatorHarness]:
    deps = RuntimeDependencies(made.api, made.cache, port=made.port)
    runtimes = RuntimeManager(deps, on_change=lambda _: None)
    runner = web.AppRunner(
        make_models_app(runtimes.find_controller), access_log=None, shutdown_timeout=0.5
    )
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    headers = {"Authorization": f"Bearer {ctx.secrets.token}"}
    async with aiohttp.ClientSession(f"http://{host}:{port}", headers=headers) as http:
        try:
            await runtimes.ensure(ctx)
            await eventually(lambda: runtimes.find_controller(*KEY) is not None)
            yield OperatorHarness(runtimes, http)
        finally:
            await runtimes.stop()
            await runner.cleanup()


async def functions_in(address: str, token: str) -> list[str]:
    headers = {"Authorization": f"Bearer {token}"}
    async with (
        aiohttp.ClientSession(headers=headers) as http,
        http.get(f"http://{address}/v1/functions") as response,
    ):
        return [function["id"] for function in (await response.json())["functions"]]


def test_scales_from_zero_survives_a_restart_and_scales_to_zero(
    prepared_store: PreparedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = prepared_store("mixtral")
    summary = StoreSummary.from_termination_message(success_message(store.manifest).decode())
    assert isinstance(summary, StoreSummary)
    ctx = make_context(SPEC, name="tiny", summary=summary)
    monkeypatch.setattr(model_runtime, "store_path", lambda _: str(store.path))

    async def scenario() -> None:
        runner = ProcessPodRunner(ctx.secrets.token)
        async with asyncio.timeout(DEADLINE_S), running_cluster(runner=runner) as made:
            async with operator(made, ctx) as first:
                table = await first.table()
                assert table.model_digest == store.manifest.digest
                assert [entry.addresses for entry in table.functions] == [()] * len(table.functions)
                assert made.api.pods() == {}
                name = table.functions[0].spec.id
                assert await first.post("wake", functions=[name]) == 202
                await eventually_serves(first, name)
                (entry, *_) = (await first.table()).functions
                (address,) = entry.addresses
                ((pod_name, pod),) = made.api.pods().items()
                assert address == f"{pod['status']['podIP']}:{made.port}"
                assert await functions_in(address, ctx.secrets.token) == [name]
                await eventually(lambda: labels_of(made) == {(pod_name, "assigned", name)})
            async with operator(made, ctx) as second:
                (entry, *_) = (await second.table()).functions
                assert entry.addresses == (address,)  # read back, not loaded again
                for _ in range(2):
                    await second.report(**{name: 0.5})
                    await asyncio.sleep(1.0)
                assert list(made.api.pods()) == [pod_name]
                await second.report()
                await eventually(
                    lambda: not made.api.pods() and not runner.processes, "scaled to zero"
                )
                # The API server deletes a pod before its watch event arrives.
                await eventually(lambda: reported_counts(second) == (0, 0, ""), "counters are zero")
                assert made.api.n_created == 1

    asyncio.run(scenario())


async def eventually_serves(running: OperatorHarness, name: str) -> None:
    found = running.runtimes.find_controller(*KEY)
    assert found is not None
    feed = found[0].routing_table
    while not any(e.addresses for e in feed.table.functions if e.spec.id == name):
        await feed.wait_for_newer(feed.version)


def reported_counts(running: OperatorHarness) -> tuple[int, int, str] | None:
    counts = running.runtimes.counts(KEY)
    return None if counts is None else (counts.active, counts.sandboxes, counts.failure)


def labels_of(made: FakeCluster) -> set[tuple[str, str, str | None]]:
    return {
        (name, pod["metadata"]["labels"][POOL_LABEL], pod["metadata"]["labels"].get(FUNCTION_LABEL))
        for name, pod in made.api.pods().items()
    }
