"""Pods that answer: an API server in memory whose pods are HTTP servers at addresses of their own.

Each pod gets a loopback address (127.0.1.1, 127.0.1.2, …) and listens on the same port there, as
pods do. What runs in it is a box of this process, or a real sandbox process.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from aiohttp import web
from fake_kube_api import FakeKubeApi
from fake_platform import SandboxServer
from sandbox_processes import sandbox_env

from faasmoe_operator.kube.cache import ObjectCache
from faasmoe_operator.kube.types import POD, Kind, Object

NAMESPACE = "llm"
_hosts = (f"127.0.{net}.{host}" for net in itertools.count(1) for host in range(1, 255))


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class PodRunner(Protocol):
    """Runs what is in a pod."""

    async def start(self, pod: Object, host: str, port: int) -> None:
        """Start a pod's container; it listens when this returns, or soon."""
        ...

    async def stop(self, name: str) -> None:
        """End a pod's container."""
        ...


@dataclass
class ServerPodRunner:
    """Runs boxes; `prepare` may change one before it starts."""

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
        """Return the pods that hold a function."""
        return [name for name, box in self.servers.items() if function in box.functions]


@dataclass
class ProcessPodRunner:
    """Runs `python -m faasmoe_expert`."""

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
    """Return a variable in the environment of a pod's container."""
    (container,) = pod["spec"]["containers"]
    return str(next(v["value"] for v in container["env"] if v["name"] == name))


class FakeKubeApiWithPods(FakeKubeApi):
    """The API server and the node: a created pod runs, a deleted one ends and then goes.

    Attributes:
        n_created: pods created so far.
        is_idle_node: pods stay as they are created: no node takes them.
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
        """Return the pods that there are, by name."""
        return {name: obj for (kind, _, name), obj in self.objects.items() if kind == POD}

    async def kill(self, name: str, **status: Any) -> None:
        """End a pod's container; the pod stays, and says why."""
        await self._runner.stop(name)
        self.set_status(POD, NAMESPACE, name, **{"phase": "Failed", **status})

    async def close(self) -> None:
        """End all that runs."""
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
    """A cache, an API server and pods, for one test."""

    cache: ObjectCache
    api: FakeKubeApiWithPods
    pods: ServerPodRunner
    port: int


@asynccontextmanager
async def running_cluster(
    *, prepare: Callable[[SandboxServer], None] = lambda _: None, runner: PodRunner | None = None
) -> AsyncIterator[FakeCluster]:
    """Run a cluster whose pods are boxes, or what a runner runs."""
    cache, pods, port = ObjectCache(), ServerPodRunner(prepare), free_port()
    api = FakeKubeApiWithPods(cache, runner or pods, port=port)
    try:
        yield FakeCluster(cache, api, pods, port)
    finally:
        await api.close()
