"""Simulated pods, for many models: they are ready at once and run nothing.

The control plane is real. Store Jobs succeed with a summary, routers are ready, and sandboxes are
small HTTP servers of this process that answer as sandboxes do and hold loaded functions.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from aiohttp import web
from apiserver import ApiRequestError, ApiServer, Object
from node_registration import NodeRegistration, condition, now

HOSTNAME = "instant"
FIRST_ADDRESS = ipaddress.ip_address("127.20.0.1")
PERIOD_S = 0.2
SANDBOX_PORT = 9090
COMPONENT = "app.kubernetes.io/component"
GONE = (404, 409)


class SimulatedPods:
    """Simulates the pods of one namespace until its context ends.

    Args:
        api: administrator client that only this object's thread uses.
        namespace: the namespace.
        summary: summary of every store, in the format of `status.model`.
        n_pods: the node's capacity of pods.

    Attributes:
        errors: failures of the simulation itself.
    """

    def __init__(
        self, api: ApiServer, namespace: str, *, summary: Object, n_pods: int = 5000
    ) -> None:
        self.errors: list[str] = []
        self._api = api
        self._namespace = namespace
        self._summary = summary
        self._registration = NodeRegistration(api, HOSTNAME, n_pods=n_pods)
        self._addresses = (str(FIRST_ADDRESS + n) for n in itertools.count())
        self._sandboxes: dict[str, web.AppRunner] = {}

    @property
    def selector(self) -> dict[str, str]:
        """Node selector of pods that are simulated here."""
        return self._registration.selector

    @contextmanager
    def running(self) -> Iterator[SimulatedPods]:
        """Register the node and simulate its pods."""
        self._registration.register()
        stopped = threading.Event()
        thread = threading.Thread(target=lambda: asyncio.run(self._run(stopped)), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            stopped.set()
            thread.join()
            self._registration.unregister()

    async def _run(self, stopped: threading.Event) -> None:
        async with self._stop_sandboxes_on_exit():
            while not stopped.is_set():
                try:
                    await self._sync_pods()
                except (ApiRequestError, OSError) as error:
                    self.errors.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(PERIOD_S)

    @asynccontextmanager
    async def _stop_sandboxes_on_exit(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            for runner in self._sandboxes.values():
                await runner.cleanup()

    async def _sync_pods(self) -> None:
        """Process pods that are pending on this node, and terminating ones."""
        await asyncio.to_thread(self._registration.send_heartbeat)
        fields = f"spec.nodeName={HOSTNAME}"
        pods = await asyncio.to_thread(self._api.list, "pods", self._namespace, fields=fields)
        for pod in pods:
            if "deletionTimestamp" in pod["metadata"]:
                await self._terminate(pod)
            elif pod["status"].get("phase") == "Pending":
                await self._complete(pod)

    async def _complete(self, pod: Object) -> None:
        component = pod["metadata"].get("labels", {}).get(COMPONENT)
        if component == "store":
            message = json.dumps({"ok": True, **self._summary})
            terminated = {"exitCode": 0, "reason": "Completed", "message": message}
            terminated |= {"startedAt": now(), "finishedAt": now()}
            status = {
                "phase": "Succeeded",
                "containerStatuses": [_status(pod, terminated=terminated)],
            }
        else:
            address = next(self._addresses)
            if component == "sandbox":
                await self._start_sandbox(pod, address)
            status = _running(pod, address)
        await self._patch_status(pod, status)

    async def _start_sandbox(self, pod: Object, address: str) -> None:
        runner = web.AppRunner(_SimulatedSandbox().app(), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, address, SANDBOX_PORT).start()
        self._sandboxes[pod["metadata"]["uid"]] = runner

    async def _terminate(self, pod: Object) -> None:
        meta = pod["metadata"]
        if runner := self._sandboxes.pop(meta["uid"], None):
            await runner.cleanup()
        await asyncio.to_thread(
            self._api.delete, "pods", meta["namespace"], meta["name"], gracePeriodSeconds=0
        )

    async def _patch_status(self, pod: Object, status: Object) -> None:
        meta = pod["metadata"]
        try:
            await asyncio.to_thread(
                self._api.patch,
                "pods",
                meta["namespace"],
                meta["name"],
                {"status": status},
                subresource="status",
            )
        except ApiRequestError as error:
            if error.status not in GONE:
                raise


class _SimulatedSandbox:
    """A sandbox server that holds functions and computes nothing."""

    def __init__(self) -> None:
        self._functions: dict[str, Object] = {}

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes(
            [
                web.get("/readyz", self._ready),
                web.get("/healthz", self._ready),
                web.get("/v1/functions", self._list),
                web.put("/v1/functions/{id}", self._attach),
                web.delete("/v1/functions/{id}", self._detach),
            ]
        )
        return app

    async def _ready(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _list(self, _: web.Request) -> web.Response:
        return web.json_response({"functions": list(self._functions.values())})

    async def _attach(self, request: web.Request) -> web.Response:
        body: dict[str, Any] = await request.json()
        name = request.match_info["id"]
        spec = {key: body[key] for key in ("layers", "experts", "model_digest")}
        self._functions[name] = {"id": name, "size_bytes": 0, **spec}
        return web.json_response(self._functions[name])

    async def _detach(self, request: web.Request) -> web.Response:
        with contextlib.suppress(KeyError):
            del self._functions[request.match_info["id"]]
        return web.Response(status=204)


def _running(pod: Object, address: str) -> Object:
    kinds = ("Initialized", "ContainersReady", "Ready", "PodScheduled")
    state = {"startedAt": now()}
    return {
        "phase": "Running",
        "podIP": address,
        "podIPs": [{"ip": address}],
        "conditions": [condition(kind, is_true=True) for kind in kinds],
        "containerStatuses": [
            _status(pod, running=state) | {"ready": True, "started": True},
        ],
    }


def _status(pod: Object, **state: Object) -> Object:
    container = pod["spec"]["containers"][0]
    named = {"name": container["name"], "image": container["image"], "imageID": ""}
    return {**named, "ready": False, "restartCount": 0, "state": dict(state)}
