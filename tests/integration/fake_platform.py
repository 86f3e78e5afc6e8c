"""A platform whose sandboxes are HTTP servers in this process, optionally faulty.

Tests of the control core use it: real sockets and HTTP, but no processes.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aiohttp import web

from faasmoe_contracts.control_messages import LoadReport
from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_operator.control.controller import Controller, ControllerTiming
from faasmoe_operator.control.functions import ManagedFunction
from faasmoe_operator.control.machine_memory import SharedMemory
from faasmoe_operator.control.model import ControlledModel
from faasmoe_operator.control.sandbox_client import ModelStore, SandboxClient, SandboxClientTimeouts
from faasmoe_operator.errors import PlatformError
from faasmoe_operator.platforms.base import (
    Platform,
    ProcessSandboxTemplate,
    Sandbox,
    SandboxEvent,
    SandboxTemplate,
)
from faasmoe_operator.platforms.registry import SandboxRegistry
from faasmoe_operator.scaling import ScalingSettings

DIGEST = "sha256:0"
TOKEN = "secret"
DEADLINE_S = 120.0
CLOCK_SPEED = 20.0
"""Seconds of the controller's clock per real second."""
TIMING = ControllerTiming(
    tick_s=1 / CLOCK_SPEED,
    coalesce_s=0.001,
    drain_s=0.2,
    probe_interval_s=0.05,
    start_deadline_s=5 * CLOCK_SPEED,
    adopt_timeout_s=20.0,
)
TIMEOUTS = SandboxClientTimeouts(
    connect_timeout_s=60.0, list_timeout_s=0.5, attach_timeout_s=4.0, detach_timeout_s=4.0
)
FAST_SCALING = ScalingSettings(
    initial_scale=0,
    max_scale=8,
    target=4,
    window_s=6,
    panic_window_percentage=20,
    scale_to_zero_grace_period_s=2,
)

FaultHandler = Callable[[web.Request], Awaitable[web.Response | None]]


def fast_clock() -> float:
    """Return a monotonic time that runs CLOCK_SPEED times as fast."""
    return time.monotonic() * CLOCK_SPEED


@dataclass
class SandboxServer:
    """One sandbox.

    Attributes:
        id: sandbox id.
        capacity: maximum number of functions.
        memory_limit: maximum number of functions before it reports out of memory; None for none.
        functions: attached functions by id.
        fault_handler: may respond to a request instead of the sandbox.
        calls: method and function of each request that changes something.
        address: host:port.
    """

    id: str
    capacity: int = 1
    memory_limit: int | None = None
    functions: dict[str, dict[str, Any]] = field(default_factory=dict)
    fault_handler: FaultHandler | None = None
    calls: list[str] = field(default_factory=list)
    address: str = ""

    def app(self) -> web.Application:
        """Return the web application."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._handle)
        return app

    async def _handle(self, request: web.Request) -> web.Response:
        name = request.path.rpartition("/")[2]
        if request.method != "GET":
            self.calls += (f"{request.method} {each}" for each in await _changed(request, name))
        if (
            self.fault_handler is not None
            and (response := await self.fault_handler(request)) is not None
        ):
            return response
        if request.method == "PUT" and name == "functions":
            return self._attach_all(await request.json())
        if request.method == "PUT":
            refusal = self._attach(name, await request.json())
            return web.json_response({}, status=201) if refusal is None else refusal
        if request.method == "DELETE" and name == "functions":
            return self._detach_all((await request.json())["store"])
        if request.method == "DELETE":
            self.functions.pop(name, None)
            return web.Response(status=204)
        store = request.query.get("store")
        listed = [
            {"id": n, **body, "size_bytes": 1}
            for n, body in self.functions.items()
            if store in (None, body.get("store"))
        ]
        memory = {"limit_bytes": self.memory_limit, "used_bytes": len(listed)}
        return web.json_response(
            {"sandbox": {"id": self.id, "memory": memory}, "functions": listed}
        )

    def _attach(self, name: str, body: dict[str, Any]) -> web.Response | None:
        """Attach a function; return the response if it is refused."""
        if len(self.functions) >= self.capacity:
            return error_response(409, "attach_refused")
        if self.memory_limit is not None and len(self.functions) >= self.memory_limit:
            return error_response(503, "out_of_memory")
        self.functions[name] = body
        return None

    def _detach_all(self, store: str) -> web.Response:
        detached = [name for name, body in self.functions.items() if body["store"] == store]
        for name in detached:
            del self.functions[name]
        return web.json_response({"detached": detached})

    def _attach_all(self, body: dict[str, Any]) -> web.Response:
        results = []
        for function in body.pop("functions"):
            name = function["id"]
            refusal = self._attach(name, {**body, **function})
            refused = {} if refusal is None else json.loads(str(refusal.text))
            results.append({"id": name, **refused})
        return web.json_response({"functions": results})


async def _changed(request: web.Request, name: str) -> list[str]:
    """Return the functions that a request changes; a store if it changes all of it."""
    if name != "functions":
        return [name]
    body = await request.json()
    return [body["store"]] if request.method == "DELETE" else [f["id"] for f in body["functions"]]


def error_response(status: int, code: str) -> web.Response:
    """Return an error response as sandboxes send it."""
    return web.json_response({"error": {"code": code, "message": code}}, status=status)


class FakePlatform:
    """A platform that runs a `SandboxServer` per sandbox.

    Attributes:
        servers: running servers by sandbox id.
        fault_handlers: fault handlers of the sandboxes created next, one each.
        is_broken: whether `create` raises PlatformError.
        memory_limit: memory limit of the sandboxes created next; each function takes 1.
        n_created: number of sandboxes created so far.
    """

    def __init__(self) -> None:
        self.servers: dict[str, SandboxServer] = {}
        self.fault_handlers: list[FaultHandler | None] = []
        self.is_broken = False
        self.memory_limit: int | None = None
        self.n_created = 0
        self._names = (f"box{number}" for number in itertools.count(1))
        self._registry = SandboxRegistry()
        self._runners: dict[str, web.AppRunner] = {}
        self._starting: set[asyncio.Task[Sandbox]] = set()

    async def create(self, template: SandboxTemplate) -> Sandbox:
        self.n_created += 1
        if self.is_broken:
            raise PlatformError("the platform is broken")
        fault = self.fault_handlers.pop(0) if self.fault_handlers else None
        server = SandboxServer(
            next(self._names), template.capacity, self.memory_limit, fault_handler=fault
        )
        starting = asyncio.create_task(self.start_sandbox(server, template))
        self._starting.add(starting)
        starting.add_done_callback(self._starting.discard)
        return await asyncio.shield(starting)  # like a process start, it is not cancelled half-way

    async def start_sandbox(self, server: SandboxServer, template: SandboxTemplate) -> Sandbox:
        """Run a server; the sandbox is ready immediately."""
        runner = web.AppRunner(server.app(), access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        server.address = f"{host}:{port}"
        self.servers[server.id], self._runners[server.id] = server, runner
        sandbox = Sandbox(server.id, server.address, True, template.digest)
        self._registry.upsert(sandbox)
        return sandbox

    def add_pending(self, name: str, template: SandboxTemplate) -> None:
        """Add a sandbox without an address, like a pod that cannot be scheduled."""
        self._registry.upsert(Sandbox(name, "", False, template.digest))

    async def delete(self, sandbox_id: str, *, at_once: bool = False, failed: bool = False) -> None:
        if (sandbox := self._registry.get(sandbox_id)) is not None:
            self._registry.upsert(replace(sandbox, ready=False))
        await self.kill(sandbox_id)

    def terminate(self, sandbox_id: str) -> None:
        """Let a sandbox be terminating, as if others had deleted its pod; `kill` ends it."""
        if (sandbox := self._registry.get(sandbox_id)) is not None:
            self._registry.upsert(replace(sandbox, ready=False, terminating=True))

    async def kill(self, sandbox_id: str) -> None:
        """Stop a sandbox abruptly."""
        if self.servers.pop(sandbox_id, None) is not None:
            runner = self._runners.pop(sandbox_id)
            self._registry.remove(sandbox_id, reason="killed")
            await asyncio.shield(runner.cleanup())

    async def list(self) -> tuple[Sandbox, ...]:
        return self._registry.all()

    def watch(self) -> AsyncIterator[SandboxEvent]:
        return self._registry.watch()

    def sandboxes_with(self, function: str) -> Sequence[str]:
        """Return the sandboxes to which a function is attached."""
        return [server.id for server in self.servers.values() if function in server.functions]

    async def close(self) -> None:
        """Stop all sandboxes."""
        await asyncio.gather(*self._starting)
        for name in tuple(self.servers):
            await self.kill(name)


def make_model(
    n_functions: int = 3,
    *,
    capacity: int = 1,
    warm_pool: int = 1,
    scaling: ScalingSettings = FAST_SCALING,
    store: ModelStore | None = None,
    memory_limit: int | None = None,
    size_bytes: int = 1,
    prefix: str = "f",
) -> ControlledModel:
    """Return a model with functions f0, f1, …, each of its own layer."""
    specs = [FunctionSpec(f"{prefix}{index}", (index,), (0, 1)) for index in range(n_functions)]
    functions = {spec.id: ManagedFunction(spec, size_bytes, scaling) for spec in specs}
    model_store = store or ModelStore(Path("/store"), DIGEST)
    template = ProcessSandboxTemplate(capacity)
    return ControlledModel("tiny", model_store, functions, template, warm_pool, memory_limit)


@asynccontextmanager
async def running_controller(
    model: ControlledModel,
    platform: Platform[Any],
    *,
    timing: ControllerTiming = TIMING,
    memory: SharedMemory | None = None,
) -> AsyncIterator[Controller]:
    """Run a controller on a platform; the sandboxes remain when the context ends."""
    async with asyncio.timeout(DEADLINE_S), SandboxClient(token=TOKEN, timeouts=TIMEOUTS) as client:
        controller = Controller(
            model, platform, client, timing=timing, memory=memory, clock=fast_clock
        )
        await controller.start()
        controller_task = asyncio.create_task(controller.run())
        try:
            yield controller
        finally:
            controller_task.cancel()
            await asyncio.gather(controller_task, return_exceptions=True)


@asynccontextmanager
async def controller_and_platform(
    model: ControlledModel, *, timing: ControllerTiming = TIMING
) -> AsyncIterator[tuple[Controller, FakePlatform]]:
    """Run a controller with a platform of its own."""
    platform = FakePlatform()
    try:
        async with running_controller(model, platform, timing=timing) as controller:
            yield controller, platform
    finally:
        await platform.close()


@asynccontextmanager
async def reporting_load(controller: Controller, report: LoadReport) -> AsyncIterator[None]:
    """Send the same load report every tick, and an idle report at the end."""

    async def report_repeatedly() -> None:
        while True:
            controller.add_load_report(report)
            await asyncio.sleep(controller.timing.tick_s)

    task = asyncio.create_task(report_repeatedly())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        controller.add_load_report(LoadReport(report.router))


async def eventually(condition: Callable[[], bool], what: str = "") -> None:
    """Wait until a condition holds."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"timed out waiting for {what or 'a condition'}"
        await asyncio.sleep(0.002)


def routable_functions(controller: Controller) -> set[str]:
    """Return the functions with an address in the routing table."""
    return {entry.spec.id for entry in controller.routing_table.table.functions if entry.addresses}
