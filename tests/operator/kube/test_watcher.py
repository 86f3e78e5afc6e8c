"""kopf itself, against a server that lists and streams as the API does."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from kube_objects import an_object

from faasmoe_operator.kube.kinds import MOEMODEL, POD, Kind, Object
from faasmoe_operator.kube.watcher import Watcher

WAIT_S = 20.0
NAMESPACE = Kind("v1", "Namespace", "namespaces", namespaced=False)
CRD = Kind(
    "apiextensions.k8s.io/v1",
    "CustomResourceDefinition",
    "customresourcedefinitions",
    namespaced=False,
)
SERVED = (POD, NAMESPACE, MOEMODEL, CRD)


def group_of(kind: Kind) -> Object:
    version = {"groupVersion": kind.api_version, "version": kind.version}
    return {"name": kind.group, "versions": [version], "preferredVersion": version}


def discovered(kind: Kind) -> Object:
    return {
        "name": kind.plural,
        "singularName": kind.name.lower(),
        "kind": kind.name,
        "namespaced": kind.namespaced,
        "verbs": ["get", "list", "watch", "patch"],
    }


@dataclass
class ApiServer:
    """Objects that there are, and streams that are told what changes."""

    objects: dict[str, list[Object]]
    queries: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    streams: dict[str, asyncio.Queue[Object]] = field(default_factory=dict)

    async def tell(self, plural: str, type_: str, obj: Object) -> None:
        """Send an event into a stream that is open or will be."""
        await self._stream(plural).put({"type": type_, "object": obj})

    def _stream(self, plural: str) -> asyncio.Queue[Object]:
        return self.streams.setdefault(plural, asyncio.Queue())

    def app(self) -> web.Application:
        app = web.Application()
        answers: dict[str, Any] = {
            "/version": {"major": "1", "minor": "36"},
            "/api": {"versions": ["v1"]},
            "/apis": {"groups": [group_of(kind) for kind in SERVED if kind.group]},
            "/api/v1": {"resources": [discovered(POD), discovered(NAMESPACE)]},
            f"/apis/{MOEMODEL.api_version}": {"resources": [discovered(MOEMODEL)]},
            f"/apis/{CRD.api_version}": {"resources": [discovered(CRD)]},
        }
        for path, answer in answers.items():
            app.router.add_get(path, self._always(answer))
        app.router.add_get("/{path:.*}", self._list_or_watch)
        return app

    @staticmethod
    def _always(answer: Any) -> Any:
        async def handle(_: web.Request) -> web.Response:
            return web.json_response(answer)

        return handle

    async def _list_or_watch(self, request: web.Request) -> web.StreamResponse:
        plural = request.path.rpartition("/")[2]
        self.queries.append((request.path, dict(request.query)))
        if "watch" in request.query:
            return await self._watch(request, plural)
        listed = {"metadata": {"resourceVersion": "1"}, "items": self.objects[plural]}
        return web.json_response(listed)

    async def _watch(self, request: web.Request, plural: str) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        events = self._stream(plural)
        while True:
            await response.write(json.dumps(await events.get()).encode() + b"\n")


class Heard:
    """Notes what is delivered; a test goes on when there was enough."""

    def __init__(self) -> None:
        self.events: list[tuple[Kind, str | None, str]] = []
        self.n_interruptions = 0
        self._came = asyncio.Event()

    def take(self, kind: Kind, type_: str | None, obj: Object) -> None:
        asyncio.get_running_loop()  # raises in any other thread than that of the loop
        self.events.append((kind, type_, obj["metadata"]["name"]))
        self._came.set()

    def interrupt(self) -> None:
        self.n_interruptions += 1

    async def until(self, n_events: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while len(self.events) < n_events:
                self._came.clear()
                await self._came.wait()


@asynccontextmanager
async def watching(
    server: ApiServer, folder: Path, monkeypatch: pytest.MonkeyPatch, *namespaces: str
) -> AsyncIterator[Heard]:
    runner = web.AppRunner(server.app(), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = "http://{}:{}".format(*runner.addresses[0][:2])
    config = {
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
    }
    (folder / "kubeconfig").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(folder / "kubeconfig"))
    heard = Heard()
    watcher = Watcher(
        kinds=(MOEMODEL, POD),
        namespaces=namespaces,
        deliver=heard.take,
        interrupted=heard.interrupt,
        restart_s=0.01,
    )
    task = asyncio.create_task(watcher.run())
    try:
        yield heard
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await runner.cleanup()


def test_delivers_what_there_is_and_what_changes_into_our_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pod = an_object(MOEMODEL, "moe"), an_object(POD, "moe-router-1")
    server = ApiServer({"moemodels": [model], "pods": []})

    async def story() -> Heard:
        async with watching(server, tmp_path, monkeypatch) as heard:
            await heard.until(1)
            await server.tell("pods", "ADDED", pod)
            await heard.until(2)
            await server.tell("pods", "DELETED", pod)
            await heard.until(3)
        return heard

    assert asyncio.run(story()).events == [
        (MOEMODEL, None, "moe"),
        (POD, "ADDED", "moe-router-1"),
        (POD, "DELETED", "moe-router-1"),
    ]


def test_asks_only_for_what_is_ours_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ApiServer({"moemodels": [an_object(MOEMODEL, "moe")], "pods": []})

    async def story() -> None:
        async with watching(server, tmp_path, monkeypatch, "llm") as heard:
            await heard.until(1)

    asyncio.run(story())
    paths = {path for path, _ in server.queries}
    assert paths == {
        "/api/v1/namespaces/llm/pods",
        "/apis/faasmoe.dev/v1alpha1/namespaces/llm/moemodels",
    }
    selectors = {path: query.get("labelSelector") for path, query in server.queries}
    assert selectors == {
        "/api/v1/namespaces/llm/pods": "app.kubernetes.io/managed-by=faasmoe-operator",
        "/apis/faasmoe.dev/v1alpha1/namespaces/llm/moemodels": None,
    }


def test_begins_anew_when_kopf_gives_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = ApiServer({"moemodels": [an_object(MOEMODEL, "moe")], "pods": []})

    async def story() -> Heard:
        async with watching(server, tmp_path, monkeypatch) as heard:
            await heard.until(1)
            await server.tell("pods", "ERROR", {"kind": "Status", "code": 500, "message": "etcd"})
            await heard.until(2)
        return heard

    heard = asyncio.run(story())
    assert heard.n_interruptions == 1
    assert heard.events == [(MOEMODEL, None, "moe")] * 2
    assert "kopf has failed" in caplog.text
