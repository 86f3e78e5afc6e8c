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
from kube_objects import make_object

from faasmoe_operator.kube.informer import KopfThread
from faasmoe_operator.kube.types import MOEMODEL, POD, Kind, Object

WAIT_S = 20.0
NAMESPACE = Kind("v1", "Namespace", "namespaces", namespaced=False)
CRD = Kind(
    "apiextensions.k8s.io/v1",
    "CustomResourceDefinition",
    "customresourcedefinitions",
    namespaced=False,
)
SERVED = (POD, NAMESPACE, MOEMODEL, CRD)


def api_group(kind: Kind) -> Object:
    version = {"groupVersion": kind.api_version, "version": kind.version}
    return {"name": kind.group, "versions": [version], "preferredVersion": version}


def api_resource(kind: Kind) -> Object:
    return {
        "name": kind.plural,
        "singularName": kind.name.lower(),
        "kind": kind.name,
        "namespaced": kind.namespaced,
        "verbs": ["get", "list", "watch", "patch"],
    }


@dataclass
class FakeWatchServer:
    """Objects that there are, and streams that are told what changes."""

    objects: dict[str, list[Object]]
    queries: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    streams: dict[str, asyncio.Queue[Object]] = field(default_factory=dict)

    async def send_event(self, plural: str, type_: str, obj: Object) -> None:
        """Send an event into a stream that is open or will be."""
        await self._stream(plural).put({"type": type_, "object": obj})

    def _stream(self, plural: str) -> asyncio.Queue[Object]:
        return self.streams.setdefault(plural, asyncio.Queue())

    def app(self) -> web.Application:
        app = web.Application()
        answers: dict[str, Any] = {
            "/version": {"major": "1", "minor": "36"},
            "/api": {"versions": ["v1"]},
            "/apis": {"groups": [api_group(kind) for kind in SERVED if kind.group]},
            "/api/v1": {"resources": [api_resource(POD), api_resource(NAMESPACE)]},
            f"/apis/{MOEMODEL.api_version}": {"resources": [api_resource(MOEMODEL)]},
            f"/apis/{CRD.api_version}": {"resources": [api_resource(CRD)]},
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


class EventCollector:
    """Notes what is delivered; a test goes on when there was enough."""

    def __init__(self) -> None:
        self.events: list[tuple[Kind, str | None, str]] = []
        self.n_restarts = 0
        self._received = asyncio.Event()

    def on_event(self, kind: Kind, type_: str | None, obj: Object) -> None:
        asyncio.get_running_loop()  # raises in any other thread than that of the loop
        self.events.append((kind, type_, obj["metadata"]["name"]))
        self._received.set()

    def on_restart(self) -> None:
        self.n_restarts += 1

    async def wait_for_events(self, n_events: int) -> None:
        async with asyncio.timeout(WAIT_S):
            while len(self.events) < n_events:
                self._received.clear()
                await self._received.wait()


@asynccontextmanager
async def running_watch(
    server: FakeWatchServer, folder: Path, monkeypatch: pytest.MonkeyPatch, *namespaces: str
) -> AsyncIterator[EventCollector]:
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
    collector = EventCollector()
    watcher = KopfThread(
        kinds=(MOEMODEL, POD),
        namespaces=namespaces,
        on_event=collector.on_event,
        on_restart=collector.on_restart,
        restart_delay_s=0.01,
    )
    task = asyncio.create_task(watcher.run())
    try:
        yield collector
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await runner.cleanup()


def test_delivers_what_there_is_and_what_changes_into_our_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pod = make_object(MOEMODEL, "moe"), make_object(POD, "moe-router-1")
    server = FakeWatchServer({"moemodels": [model], "pods": []})

    async def story() -> EventCollector:
        async with running_watch(server, tmp_path, monkeypatch) as heard:
            await heard.wait_for_events(1)
            await server.send_event("pods", "ADDED", pod)
            await heard.wait_for_events(2)
            await server.send_event("pods", "DELETED", pod)
            await heard.wait_for_events(3)
        return heard

    assert asyncio.run(story()).events == [
        (MOEMODEL, None, "moe"),
        (POD, "ADDED", "moe-router-1"),
        (POD, "DELETED", "moe-router-1"),
    ]


def test_asks_only_for_what_is_ours_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = FakeWatchServer({"moemodels": [make_object(MOEMODEL, "moe")], "pods": []})

    async def story() -> None:
        async with running_watch(server, tmp_path, monkeypatch, "llm") as heard:
            await heard.wait_for_events(1)

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
    server = FakeWatchServer({"moemodels": [make_object(MOEMODEL, "moe")], "pods": []})

    async def story() -> EventCollector:
        async with running_watch(server, tmp_path, monkeypatch) as heard:
            await heard.wait_for_events(1)
            await server.send_event(
                "pods", "ERROR", {"kind": "Status", "code": 500, "message": "etcd"}
            )
            await heard.wait_for_events(2)
        return heard

    heard = asyncio.run(story())
    assert heard.n_restarts == 1
    assert heard.events == [(MOEMODEL, None, "moe")] * 2
    assert "kopf failed" in caplog.text
