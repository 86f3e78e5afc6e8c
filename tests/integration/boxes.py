"""A platform whose sandboxes are HTTP servers of this process, well-behaved or not.

Real sockets and real HTTP, no processes: for tests of the control core.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aiohttp import web

from faasmoe_expert.table import FunctionSpec
from faasmoe_operator.control.controller import Controller
from faasmoe_operator.control.functions import ManagedFunction
from faasmoe_operator.control.model import ControlledModel
from faasmoe_operator.control.reports import LoadReport
from faasmoe_operator.control.sandbox_client import ModelStore, SandboxClient, Timeouts
from faasmoe_operator.control.timing import Timing
from faasmoe_operator.errors import PlatformError
from faasmoe_operator.platforms.base import Sandbox, SandboxEvent, SandboxTemplate, Template
from faasmoe_operator.platforms.roster import Roster
from faasmoe_operator.scaling import ScalingSettings

DIGEST = "sha256:0"
TOKEN = "secret"
DEADLINE_S = 20.0
SPEED = 20.0
"""Seconds of the controller's clock in a real one."""
TIMING = Timing(
    tick_s=1 / SPEED,
    coalesce_s=0.001,
    drain_s=0.2,
    probe_interval_s=0.05,
    start_deadline_s=5 * SPEED,
    adopt_timeout_s=5.0,
)
TIMEOUTS = Timeouts(
    connect_timeout_s=5.0, list_timeout_s=0.5, attach_timeout_s=1.0, detach_timeout_s=1.0
)
QUICK = ScalingSettings(
    initial_scale=0,
    max_scale=8,
    target=4,
    window_s=6,
    panic_window_percentage=20,
    scale_to_zero_grace_period_s=2,
)

Fault = Callable[[web.Request], Awaitable[web.Response | None]]


def fast_clock() -> float:
    """Return a time that goes SPEED times as fast."""
    return time.monotonic() * SPEED


@dataclass
class Box:
    """One sandbox; `fault` may answer a request in its place."""

    id: str
    capacity: int = 1
    memory_limit: int | None = None
    functions: dict[str, dict[str, Any]] = field(default_factory=dict)
    fault: Fault | None = None
    calls: list[str] = field(default_factory=list)
    address: str = ""

    def app(self) -> web.Application:
        """Return its server."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        return app

    async def _answer(self, request: web.Request) -> web.Response:
        name = request.path.rpartition("/")[2]
        if request.method != "GET":
            self.calls.append(f"{request.method} {name}")
        if self.fault is not None and (answer := await self.fault(request)) is not None:
            return answer
        if request.method == "PUT":
            return await self._attach(name, request)
        if request.method == "DELETE":
            self.functions.pop(name, None)
            return web.Response(status=204)
        listed = [{"id": n, **body, "size_bytes": 1} for n, body in self.functions.items()]
        memory = {"limit_bytes": self.memory_limit, "used_bytes": len(listed)}
        return web.json_response(
            {"sandbox": {"id": self.id, "memory": memory}, "functions": listed}
        )

    async def _attach(self, name: str, request: web.Request) -> web.Response:
        if len(self.functions) >= self.capacity:
            return refused(409, "attach_refused")
        if self.memory_limit is not None and len(self.functions) >= self.memory_limit:
            return refused(503, "out_of_memory")
        self.functions[name] = await request.json()
        return web.json_response({}, status=201)


def refused(status: int, code: str) -> web.Response:
    """Return an error object as sandboxes send it."""
    return web.json_response({"error": {"code": code, "message": code}}, status=status)


class Boxes:
    """A platform; `faults` go one by one to the boxes that are created next."""

    def __init__(self) -> None:
        self.boxes: dict[str, Box] = {}
        self.faults: list[Fault | None] = []
        self.broken = False
        self.memory_limit: int | None = None
        """Of the boxes that are created next; each function takes 1."""
        self.n_created = 0
        self._names = (f"box{number}" for number in itertools.count(1))
        self._roster = Roster()
        self._runners: dict[str, web.AppRunner] = {}
        self._adding: set[asyncio.Task[Sandbox]] = set()

    async def create(self, template: Template) -> Sandbox:
        self.n_created += 1
        if self.broken:
            raise PlatformError("the platform is broken")
        fault = self.faults.pop(0) if self.faults else None
        box = Box(next(self._names), template.capacity, self.memory_limit, fault=fault)
        adding = asyncio.create_task(self.add(box, template))
        self._adding.add(adding)
        adding.add_done_callback(self._adding.discard)
        return await asyncio.shield(adding)  # a process would not stop half-way either

    async def add(self, box: Box, template: Template) -> Sandbox:
        """Run a box, ready at once."""
        runner = web.AppRunner(box.app(), access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        box.address = f"{host}:{port}"
        self.boxes[box.id], self._runners[box.id] = box, runner
        sandbox = Sandbox(box.id, box.address, True, template.digest)
        self._roster.put(sandbox)
        return sandbox

    def expect(self, name: str, template: Template) -> None:
        """Have a box that has no address yet, as a pod that no node has room for."""
        self._roster.put(Sandbox(name, "", False, template.digest))

    async def delete(self, sandbox_id: str) -> None:
        if (sandbox := self._roster.get(sandbox_id)) is not None:
            self._roster.put(replace(sandbox, ready=False))
        await self.kill(sandbox_id)

    async def kill(self, sandbox_id: str) -> None:
        """End a box without asking."""
        if self.boxes.pop(sandbox_id, None) is not None:
            runner = self._runners.pop(sandbox_id)
            self._roster.remove(sandbox_id, reason="killed")
            await asyncio.shield(runner.cleanup())

    async def list(self) -> tuple[Sandbox, ...]:
        return self._roster.all()

    def watch(self) -> AsyncIterator[SandboxEvent]:
        return self._roster.watch()

    def holders(self, function: str) -> Sequence[str]:
        """Return the boxes that hold a function."""
        return [box.id for box in self.boxes.values() if function in box.functions]

    async def end(self) -> None:
        """End every box."""
        await asyncio.gather(*self._adding)
        for name in tuple(self.boxes):
            await self.kill(name)


def model_of(
    n_functions: int = 3,
    *,
    capacity: int = 1,
    warm_pool: int = 1,
    scaling: ScalingSettings = QUICK,
    store: ModelStore | None = None,
    memory_limit: int | None = None,
    size_bytes: int = 1,
) -> ControlledModel:
    """Return a model of functions f0, f1, … each a layer of its own."""
    specs = [FunctionSpec(f"f{index}", (index,), (0, 1)) for index in range(n_functions)]
    functions = {spec.id: ManagedFunction(spec, size_bytes, scaling) for spec in specs}
    place = store or ModelStore(Path("/store"), DIGEST)
    template = SandboxTemplate(capacity)
    return ControlledModel("tiny", place, functions, template, warm_pool, memory_limit)


@asynccontextmanager
async def controlling(
    model: ControlledModel, boxes: Boxes, *, timing: Timing = TIMING
) -> AsyncIterator[Controller]:
    """Run a controller over boxes, which are left as they are at its end."""
    async with asyncio.timeout(DEADLINE_S), SandboxClient(token=TOKEN, timeouts=TIMEOUTS) as client:
        controller = Controller(model, boxes, client, timing=timing, clock=fast_clock)
        await controller.start()
        running = asyncio.create_task(controller.run())
        try:
            yield controller
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


@asynccontextmanager
async def world(
    model: ControlledModel, *, timing: Timing = TIMING
) -> AsyncIterator[tuple[Controller, Boxes]]:
    """Run a controller over boxes of its own."""
    boxes = Boxes()
    try:
        async with controlling(model, boxes, timing=timing) as controller:
            yield controller, boxes
    finally:
        await boxes.end()


@asynccontextmanager
async def reporting(controller: Controller, report: LoadReport) -> AsyncIterator[None]:
    """Have a router say the same once a second, and at the end that it is idle."""

    async def report_again() -> None:
        while True:
            controller.take(report)
            await asyncio.sleep(controller.timing.tick_s)

    task = asyncio.create_task(report_again())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        controller.take(LoadReport(report.router))


async def eventually(condition: Callable[[], bool], what: str = "") -> None:
    """Wait until a condition holds."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"not in time: {what}"
        await asyncio.sleep(0.002)


def serving(controller: Controller) -> set[str]:
    """Return the functions that have an address in the table."""
    return {entry.spec.id for entry in controller.feed.table.functions if entry.addresses}
