"""A Kubernetes API server over real HTTP that lists in pages and streams watches from a history."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from kube_objects import make_object
from kubernetes.aio.client.configuration import Configuration

from faasmoe_operator.kube.client import KubeClient
from faasmoe_operator.kube.transport import KubeTransport
from faasmoe_operator.kube.types import Kind, Object

MANAGED_LABELS = {"app.kubernetes.io/managed-by": "faasmoe-operator"}
PAGE_SIZE = 2


@dataclass(frozen=True)
class Request:
    """A list or a watch that the server received."""

    verb: str
    path: str
    query: dict[str, str]


@dataclass(eq=False)
class _Stream:
    """An open watch; None in the queue ends it."""

    path: str
    selector: str
    events: asyncio.Queue[bytes | None] = field(default_factory=asyncio.Queue)


class FakeWatchServer:
    """Lists and watches over HTTP, with one version counter as in etcd.

    Attributes:
        requests: lists and watches received so far.
        failures: HTTP statuses to answer the next requests with, by verb ("list" or "watch").
        served: the kinds that are served.
    """

    def __init__(self, *served: Kind) -> None:
        self.served = set(served)
        self.requests: list[Request] = []
        self.failures: dict[str, list[int]] = {}
        self._version = 10
        self._oldest_version = 0
        self._objects: dict[tuple[str, str], Object] = {}
        self._history: list[tuple[int, str, Object]] = []
        self._streams: list[_Stream] = []

    def write(self, kind: Kind, name: str, **options: Any) -> Object:
        """Create or change an object that the operator manages; watches get the event."""
        options.setdefault("labels", MANAGED_LABELS)
        obj = make_object(kind, name, version=self._next_version(), **options)
        key = _list_path(obj), name
        event_type = "MODIFIED" if key in self._objects else "ADDED"
        self._objects[key] = obj
        self._record(event_type, obj)
        return obj

    def delete(self, kind: Kind, name: str) -> None:
        """Delete an object; watches get the event."""
        obj = make_object(kind, name, version=self._next_version(), labels=MANAGED_LABELS)
        del self._objects[_list_path(obj), name]
        self._record("DELETED", obj)

    def send_bookmark(self) -> None:
        """Advance the version and send a bookmark to every watch."""
        version = str(self._next_version())
        for stream in self._streams:
            self._send(stream, "BOOKMARK", {"metadata": {"resourceVersion": version}})

    def send_error(self, code: int, reason: str) -> None:
        """Send an ERROR event to every watch, and end the watches."""
        status = {"kind": "Status", "code": code, "reason": reason, "message": reason}
        for stream in self._streams:
            self._send(stream, "ERROR", status)
        self.end_watches()

    def end_watches(self) -> None:
        """End every watch, as a server that shuts down."""
        for stream in self._streams:
            stream.events.put_nowait(None)
        self._streams.clear()

    def compact(self) -> None:
        """Forget the history: watches from an earlier version get 410."""
        self._history.clear()
        self._oldest_version = self._version

    def count(self, verb: str) -> int:
        """Return the number of lists or watches received."""
        return sum(request.verb == verb for request in self.requests)

    def n_watching(self) -> int:
        """Return the number of open watches."""
        return len(self._streams)

    def watch_versions(self) -> list[str]:
        """Return the versions that watches started from."""
        return [r.query["resourceVersion"] for r in self.requests if r.verb == "watch"]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer a list, a watch or a discovery."""
        kinds = [kind for kind in self.served if request.path.endswith(f"/{kind.plural}")]
        resources = [kind for kind in self.served if request.path.endswith(kind.api_version)]
        if resources:
            return web.json_response({"resources": [{"name": kind.plural} for kind in resources]})
        verb = "watch" if "watch" in request.query else "list"
        self.requests.append(Request(verb, request.path, dict(request.query)))
        if not kinds:
            return _status_response(404, "NotFound")
        if failures := self.failures.get(verb):
            return _status_response(failures.pop(0), "Injected")
        if verb == "list":
            return self._list(request)
        return await self._watch(request)

    def _list(self, request: web.Request) -> web.Response:
        selector = request.query.get("labelSelector", "")
        items = [
            {key: value for key, value in obj.items() if key not in ("kind", "apiVersion")}
            for (path, _), obj in self._objects.items()
            if _is_selected(path, obj, request.path, selector)
        ]
        start = int(request.query.get("continue", "0"))
        metadata: Object = {"resourceVersion": str(self._version)}
        if start + PAGE_SIZE < len(items):
            metadata["continue"] = str(start + PAGE_SIZE)
        page = items[start : start + PAGE_SIZE]
        return web.json_response({"metadata": metadata, "items": page})

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        version = int(request.query["resourceVersion"])
        if version < self._oldest_version:
            return _status_response(410, "Expired")
        stream = _Stream(request.path, request.query.get("labelSelector", ""))
        for event_version, event_type, obj in self._history:
            if event_version > version:
                self._send_selected(stream, event_type, obj)
        self._streams.append(stream)
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while (line := await stream.events.get()) is not None:
                half = len(line) // 2
                await response.write(line[:half])  # lines do not arrive in one piece
                await response.write(line[half:])
        finally:
            if stream in self._streams:
                self._streams.remove(stream)
        return response

    def _next_version(self) -> int:
        self._version += 1
        return self._version

    def _record(self, event_type: str, obj: Object) -> None:
        self._history.append((self._version, event_type, obj))
        for stream in self._streams:
            self._send_selected(stream, event_type, obj)

    def _send_selected(self, stream: _Stream, event_type: str, obj: Object) -> None:
        if _is_selected(_list_path(obj), obj, stream.path, stream.selector):
            self._send(stream, event_type, obj)

    @staticmethod
    def _send(stream: _Stream, event_type: str, obj: Object) -> None:
        stream.events.put_nowait(json.dumps({"type": event_type, "object": obj}).encode() + b"\n")


@asynccontextmanager
async def watch_client(server: FakeWatchServer) -> AsyncIterator[KubeClient]:
    """Serve a FakeWatchServer and yield a client of it."""
    app = web.Application()
    app.router.add_get("/{path:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host = "http://{}:{}".format(*runner.addresses[0][:2])
    # One connection for requests: watches must not use it.
    configuration = Configuration(host=host, connection_pool_maxsize=1)
    try:
        async with KubeClient(KubeTransport(configuration, retry_delays_s=())) as client:
            yield client
    finally:
        server.end_watches()
        await runner.cleanup()


def _list_path(obj: Object) -> str:
    """Return the path that lists an object's kind in its namespace."""
    root = f"/apis/{obj['apiVersion']}" if "/" in obj["apiVersion"] else f"/api/{obj['apiVersion']}"
    return f"{root}/namespaces/{obj['metadata']['namespace']}/{obj['kind'].lower()}s"


def _is_selected(path: str, obj: Object, requested_path: str, selector: str) -> bool:
    """Return whether a request covers an object: its namespace or all, and its labels."""
    namespace = f"namespaces/{obj['metadata']['namespace']}/"
    label, _, value = selector.partition("=")
    return requested_path in (path, path.replace(namespace, "")) and (
        not selector or obj["metadata"]["labels"].get(label) == value
    )


def _status_response(status: int, reason: str) -> web.Response:
    body = {"kind": "Status", "status": "Failure", "reason": reason, "message": reason}
    return web.json_response(body, status=status)
