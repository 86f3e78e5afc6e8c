"""An in-memory API server whose pods are HTTP servers.

Each pod has its own loopback address (127.0.1.1, 127.0.1.2, …) and listens on the same port. It
runs a `SandboxServer` in this process or a real sandbox process.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from aiohttp import web
from faasmoe_up import free_port
from fake_kube_api import FakeKubeApi
from fake_platform import SandboxServer
from sandbox_processes import sandbox_env

from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.types import POD, Kind, Object

NAMESPACE = "llm"
_hosts = (f"127.0.{net}.{host}" for net in itertools.count(1) for host in range(1, 255))


class PodRunner(Protocol):
    """Runs the containers of pods."""

    async def start(self, pod: Object, host: str, port: int) -> None:
        """Start the container of a pod; it listens when this returns or soon after."""
        ...

    async def stop(self, name: str) -> None:
        """Stop the container of a pod."""
        ...


@dataclass
class ServerPodRunner:
    """Runs a `SandboxServer` per pod.

    Attributes:
        prepare: called with each server before it starts.
        servers: running servers by pod name.
    """

    prepare: Callable[[SandboxServer], None] = lambda _: None
    servers: dict[str, SandboxServer] = field(default_factory=dict)
    _runners: dict[str, web.AppRunner] = field(default_factory=dict)

    async def start(self, pod: Object, host: str, port: int) -> None:
        name = pod["metadata"]["name"]
        server = SandboxServer(
            name, int(container_env(pod, "FAASMOE_CAPACITY")), address=f"{host}:{port}"
        )
        self.prepare(server)
        runner = web.AppRunner(server.app(), access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, host, port, reuse_address=True).start()
        self.servers[name], self._runners[name] = server, runner

    async def stop(self, name: str) -> None:
        self.servers.pop(name, None)
        if (runner := self._runners.pop(name, None)) is not None:
            await runner.cleanup()

    def pods_with(self, function: str) -> list[str]:
        """Return the pods to which a function is attached."""
        return [name for name, server in self.servers.items() if function in server.functions]


@dataclass
class ProcessPodRunner:
    """Runs `python -m faasmoe_expert` per pod.

    Attributes:
        token: bearer token of the sandboxes.
        processes: running processes by pod name.
    """

    token: str
    processes: dict[str, Process] = field(default_factory=dict)

    async def start(self, pod: Object, host: str, port: int) -> None:
        name = pod["metadata"]["name"]
        env = sandbox_env(
            sandbox_id=name,
            host=host,
            port=port,
            capacity=container_env(pod, "FAASMOE_CAPACITY"),
            device="cpu",
            token=self.token,
        )
        command = (sys.executable, "-m", "faasmoe_expert")
        self.processes[name] = await asyncio.create_subprocess_exec(
            *command, env={**env, "OMP_NUM_THREADS": "1"}, stdout=DEVNULL, stderr=DEVNULL
        )

    async def stop(self, name: str) -> None:
        process = self.processes.pop(name, None)
        if process is not None and process.returncode is None:
            process.terminate()
            await process.wait()


def container_env(pod: Object, name: str) -> str:
    """Return an environment variable of a pod's container."""
    (container,) = pod["spec"]["containers"]
    return str(next(v["value"] for v in container["env"] if v["name"] == name))


class FakeKubeApiWithPods(FakeKubeApi):
    """API server and node: created pods run, and deleted pods terminate before they are removed.

    Attributes:
        n_created: number of pods created so far.
        is_unschedulable: whether new pods stay pending.
    """

    def __init__(self, cache: ObjectCache | None, runner: PodRunner, *, port: int) -> None:
        super().__init__(cache)
        self.n_created = 0
        self.is_unschedulable = False
        self._runner = runner
        self._port = port
        self._started: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def create(self, kind: Kind, obj: Object) -> Object:
        created = await super().create(kind, obj)
        if kind == POD:
            self.n_created += 1
            if not self.is_unschedulable:
                self._spawn(self._run_pod(created))
        return created

    async def delete(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        *,
        uid: str | None = None,
        grace_s: int | None = None,
    ) -> None:
        self._record_request("delete", kind, name)
        obj = self.objects.get((kind, namespace, name))
        if obj is None or uid not in (None, obj["metadata"]["uid"]):
            return
        metadata = {**obj["metadata"], "deletionTimestamp": "2026-09-01T12:00:00Z"}
        self._store_object((kind, namespace, name), {**obj, "metadata": metadata})
        self._spawn(self._terminate(kind, namespace, name))

    def pods(self) -> dict[str, Object]:
        """Return all pods by name."""
        return {name: obj for (kind, _, name), obj in self.objects.items() if kind == POD}

    async def kill(self, name: str, **status: Any) -> None:
        """Stop a pod's container; the pod remains with phase Failed and the given status."""
        await self._runner.stop(name)
        self.set_status(POD, NAMESPACE, name, **{"phase": "Failed", **status})

    async def close(self) -> None:
        """Stop all containers."""
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        for name in self._started:
            await self._runner.stop(name)

    async def _run_pod(self, pod: Object) -> None:
        name, host = pod["metadata"]["name"], next(_hosts)
        self._started.append(name)
        await self._runner.start(pod, host, self._port)
        if (POD, pod["metadata"]["namespace"], name) in self.objects:
            namespace = pod["metadata"]["namespace"]
            self.set_status(POD, namespace, name, phase="Running", podIP=host)

    async def _terminate(self, kind: Kind, namespace: str, name: str) -> None:
        if kind == POD:
            await self._runner.stop(name)
        if (kind, namespace, name) in self.objects:
            self.remove(kind, namespace, name)

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@dataclass
class FakeCluster:
    """A fake cluster.

    Attributes:
        cache: cache of the API server's objects.
        api: the API server.
        pods: runner of the pods.
        port: port on which every pod listens.
    """

    cache: ObjectCache
    api: FakeKubeApiWithPods
    pods: ServerPodRunner
    port: int


@asynccontextmanager
async def running_cluster(
    *, prepare: Callable[[SandboxServer], None] = lambda _: None, runner: PodRunner | None = None
) -> AsyncIterator[FakeCluster]:
    """Run a cluster whose pods are run by `runner`, by default a `ServerPodRunner`."""
    cache, pods, port = ObjectCache(), ServerPodRunner(prepare), free_port()
    api = FakeKubeApiWithPods(cache, runner or pods, port=port)
    try:
        yield FakeCluster(cache, api, pods, port)
    finally:
        await api.close()
