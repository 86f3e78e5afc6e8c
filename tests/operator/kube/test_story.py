"""A day of one model on Kubernetes: real sandbox processes in its pods, a real store, real HTTP."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from boxes import eventually
from model_contexts import make_context
from pod_world import NAMESPACE, Cluster, ProcessRunner, cluster
from sandboxes import PreparedStore

from faasmoe_expert.table import FunctionTable
from faasmoe_operator.control.api import models_app
from faasmoe_operator.kube import blueprint
from faasmoe_operator.kube.core import Grounds
from faasmoe_operator.kube.keys import ModelKey
from faasmoe_operator.kube.manifests import ModelContext
from faasmoe_operator.kube.manifests.names import FUNCTION_LABEL, POOL_LABEL
from faasmoe_operator.kube.models import ModelCores
from faasmoe_operator.kube.store_summary import StoreSummary
from faasmoe_router.checkpoint.termination import success

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


class Operator:
    """The parts of an operator that routers see: cores, and the control API in front of them."""

    def __init__(self, cores: ModelCores, http: aiohttp.ClientSession) -> None:
        self.cores = cores
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

    async def table(self) -> FunctionTable:
        async with self._http.get(f"/models/{KEY.namespace}/{KEY.name}/v1/table") as response:
            assert response.status == 200
            return FunctionTable.from_json(json.loads(await response.content.readline())["table"])


@asynccontextmanager
async def operator(made: Cluster, ctx: ModelContext) -> AsyncIterator[Operator]:
    grounds = Grounds(made.api, made.cache, port=made.port)
    cores = ModelCores(grounds, on_change=lambda _: None)
    runner = web.AppRunner(models_app(cores.find), access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    headers = {"Authorization": f"Bearer {ctx.secrets.token}"}
    async with aiohttp.ClientSession(f"http://{host}:{port}", headers=headers) as http:
        try:
            await cores.ensure(ctx)
            await eventually(lambda: cores.find(*KEY) is not None)
            yield Operator(cores, http)
        finally:
            await cores.end()
            await runner.cleanup()


async def functions_in(address: str, token: str) -> list[str]:
    headers = {"Authorization": f"Bearer {token}"}
    async with (
        aiohttp.ClientSession(headers=headers) as http,
        http.get(f"http://{address}/v1/functions") as response,
    ):
        return [function["id"] for function in (await response.json())["functions"]]


def test_from_zero_to_a_pod_through_a_restart_and_back_to_zero(
    prepared_store: PreparedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = prepared_store("mixtral")
    summary = StoreSummary.from_termination_message(success(store.manifest).decode())
    assert isinstance(summary, StoreSummary)
    ctx = make_context(SPEC, name="tiny", summary=summary)
    monkeypatch.setattr(blueprint, "store_path", lambda _: str(store.path))

    async def story() -> None:
        runner = ProcessRunner(ctx.secrets.token)
        async with asyncio.timeout(DEADLINE_S), cluster(runner=runner) as made:
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
                assert entry.addresses == (address,)  # read back, and not attached again
                for _ in range(2):
                    await second.report(**{name: 0.5})
                    await asyncio.sleep(1.0)
                assert list(made.api.pods()) == [pod_name]
                await second.report()
                await eventually(lambda: not made.api.pods() and not runner.processes, "zero")
                # The API forgets a pod before its watch tells so.
                await eventually(lambda: told_by(second) == (0, 0, ""), "zero is told")
                assert made.api.n_created == 1

    asyncio.run(story())


async def eventually_serves(running: Operator, name: str) -> None:
    found = running.cores.find(*KEY)
    assert found is not None
    feed = found[0].feed
    while not any(e.addresses for e in feed.table.functions if e.spec.id == name):
        await feed.beyond(feed.version)


def told_by(running: Operator) -> tuple[int, int, str] | None:
    counts = running.cores.counts(KEY)
    return None if counts is None else (counts.active, counts.sandboxes, counts.trouble)


def labels_of(made: Cluster) -> set[tuple[str, str, str | None]]:
    return {
        (name, pod["metadata"]["labels"][POOL_LABEL], pod["metadata"]["labels"].get(FUNCTION_LABEL))
        for name, pod in made.api.pods().items()
    }
