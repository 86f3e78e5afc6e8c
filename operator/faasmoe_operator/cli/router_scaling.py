"""The routers of each model: how many run, by what the gateways report.

With no requests they end, and the next request starts the first one, which the gateways keep it for
meanwhile; with many, more start. When is the autoscaler's decision (`scaling/`), the same as for
functions. A router ends only once no gateway has a request of it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Never

from faasmoe_contracts.router_demand import RouterReport
from faasmoe_operator.aio import ChangeNotifier, TaskSet
from faasmoe_operator.cli.local_stack import SupervisedContext
from faasmoe_operator.cli.logs import print_progress
from faasmoe_operator.cli.supervisor import SupervisedChild
from faasmoe_operator.control.gateway_links import GatewayLinks
from faasmoe_operator.control.router_scaler import RouterScaler
from faasmoe_operator.plan.router_size import RouterSize, largest_own_bytes
from faasmoe_operator.platforms.memory import memory_parts

TICK_S = 1.0
PID_INTERVAL_S = 0.2
SPARE_IDLE_S = 1e-3  # of each further router of a model: of equally idle ones the last ends first


class RouterSlot:
    """One of a model's routers.

    Args:
        index: its number among them; lower ones start first and end last.
        start: returns the context in which it runs.
        wait_until_healthy: returns once it answers.
        size: about what it will take; later what it takes, or took when it ran last.
        may_run: whether it may run before a memory limit says so.

    Attributes:
        child: its process; None while it is not to run.
        is_ready: whether it answers.
        is_leaving: whether it gets no more requests, because it is to end.
        is_ending: whether it has had its last request.
        may_run: whether the memory limit lets it run.
        measured_s: when its memory was measured last, in monotonic seconds.
    """

    def __init__(
        self,
        index: int,
        start: Callable[[], SupervisedContext],
        wait_until_healthy: Callable[[], Awaitable[None]],
        *,
        size: RouterSize | None = None,
        may_run: bool = True,
    ) -> None:
        self.index = index
        self.start = start
        self.wait_until_healthy = wait_until_healthy
        self.size = size or RouterSize()
        self.child: SupervisedChild | None = None
        self.is_ready = False
        self.is_leaving = False
        self.is_ending = False
        self.may_run = may_run
        self.measured_s = -math.inf

    @property
    def name(self) -> str:
        """Its name among the model's routers."""
        return str(self.index)

    @property
    def pid(self) -> int | None:
        """Process id; None while it does not run."""
        return None if self.child is None else self.child.pid

    @property
    def is_measured(self) -> bool:
        """Whether its memory was ever measured."""
        return self.size.own_bytes is not None

    async def measure(self, *, n_sharing: int) -> None:
        """Measure the memory that it has now, on a thread: it takes ten milliseconds and more.

        Args:
            n_sharing: how many routers map the same weights.
        """
        if self.pid is None or not self.is_ready:
            return
        self.measured_s = time.monotonic()
        if parts := await asyncio.to_thread(memory_parts, self.pid):
            self.size = self.size.measured(parts.own_bytes, parts.file_bytes, n_sharing=n_sharing)


class MachineRouters:
    """The routers of all models, of which some map the same weights.

    Args:
        slots: all routers.
    """

    def __init__(self, slots: Iterable[RouterSlot]) -> None:
        slots = list(slots)
        self._n_running = Counter(slot.size.content for slot in slots if slot.child is not None)
        self._own_bytes = largest_own_bytes(slot.size for slot in slots)

    def n_sharing(self, slot: RouterSlot) -> int:
        """Return how many routers map a router's weights, or will when it runs."""
        return self._n_running[slot.size.content] + (slot.child is None)

    def bytes_of(self, slot: RouterSlot) -> int:
        """Return the memory that a router counts for."""
        like_it = self._own_bytes.get(slot.size.content)
        return slot.size.bytes_among(self.n_sharing(slot), like_it=like_it)


RouterState = tuple[bool, int, tuple[tuple[SupervisedChild | None, bool], ...]]
"""Whether there are requests, how many routers should run, and the process of each router with
whether it answers and is not ending."""


class ScaledRouters:
    """The routers of one model; created by `scaled_routers`.

    Args:
        model: the model's name.
        scaler: decides how many run.
        slots: the routers.
        links: the gateways.
        on_wake: called when the first router starts, but the first time.
        on_running: called with the number of routers that take requests, when that changes.

    Attributes:
        slots: as given.
        has_started: set once the first router has answered; none ends before.
    """

    def __init__(
        self,
        model: str,
        scaler: RouterScaler,
        slots: Sequence[RouterSlot],
        links: GatewayLinks,
        *,
        on_wake: Callable[[], Coroutine[Any, Any, None]] | None = None,
        on_running: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.model = model
        self.slots = tuple(slots)
        self.has_started = asyncio.Event()
        self._scaler = scaler
        self._links = links
        self._on_wake = on_wake
        self._on_running = on_running
        self._tasks = TaskSet()
        self._changed = ChangeNotifier()
        self._last_used_s = time.monotonic()
        self._had_requests = False
        self._waiting_since_s: float | None = None  # for a router that takes requests
        links.add(model, self._take_demand)

    def reports(self, machine: MachineRouters) -> list[RouterReport]:
        """Return the state of all routers, for the memory limit.

        Args:
            machine: the routers of all models.
        """
        now_s, idle_s, waiting_s = time.monotonic(), 0.0, 0.0
        if self.has_started.is_set() and not self._links.n_requests(self.model):
            idle_s = now_s - self._last_used_s
        if self._waiting_since_s is not None:
            waiting_s = now_s - self._waiting_since_s
        return [
            RouterReport(
                f"{self.model}/{slot.name}",
                machine.bytes_of(slot),
                idle_s + slot.index * SPARE_IDLE_S,
                is_running=slot.child is not None,
                is_wanted=slot.index < self._scaler.desired,
                is_pinned=slot.index < self._scaler.min_replicas,
                is_ready=slot.is_ready and not slot.is_ending,
                waiting_s=waiting_s,
            )
            for slot in self.slots
        ]

    def allow(self, may_run: frozenset[str]) -> None:
        """Take which routers the memory limit lets run, by their names in `reports`."""
        for slot in self.slots:
            slot.may_run = f"{self.model}/{slot.name}" in may_run
            if slot.index == 0 and slot.child is not None and not slot.may_run:
                self._scaler.end(time.time())
        self._changed.notify()

    @property
    def state(self) -> RouterState:
        """What a memory limit depends on; see `wait_for_change`."""
        has_requests = self._links.n_requests(self.model) > 0
        slots = tuple((s.child, s.is_ready and not s.is_ending) for s in self.slots)
        return has_requests, self._scaler.desired, slots

    async def wait_for_change(self, state: RouterState) -> None:
        """Wait until routers started or ended, more are wanted, or requests came or ended."""
        await self._changed.wait_for(lambda: self.state != state)

    async def run(self) -> Never:
        """Start and stop routers until cancelled; raises CommandError as a child does."""
        async with _first_error() as tasks:
            tasks.append(asyncio.create_task(self._tick()))
            tasks += [asyncio.create_task(self._run_slot(slot)) for slot in self.slots]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            finally:
                await self._tasks.cancel_all()
        raise AssertionError("a router's supervision ended")

    def _take_demand(self) -> None:
        """Take what the gateways have reported."""
        n_requests, now_s = self._links.n_requests(self.model), time.monotonic()
        if n_requests or self._had_requests:
            self._last_used_s = now_s
        self._had_requests = n_requests > 0
        if not n_requests or self._running:
            self._waiting_since_s = None
        elif self._waiting_since_s is None:
            self._waiting_since_s = now_s
        self._scaler.set_demand(n_requests, time.time())
        self._changed.notify()

    @property
    def _running(self) -> tuple[str, ...]:
        """The routers that take requests."""
        return tuple(s.name for s in self.slots if s.is_ready and not s.is_leaving)

    def _is_wanted(self, slot: RouterSlot) -> bool:
        return slot.index < self._scaler.desired and slot.may_run

    async def _run_slot(self, slot: RouterSlot) -> Never:
        name = self._name_of(slot)
        while True:
            await self._changed.wait_for(lambda: self._is_wanted(slot))
            if self.has_started.is_set():
                self._announce_start(slot, name)
            async with slot.start() as (child, failure), _first_error() as tasks:
                slot.child, slot.is_leaving = child, False
                child.has_started = self.has_started.is_set()
                self._changed.notify()
                tasks += [failure, asyncio.create_task(self._probe(slot, child))]
                await self._until_ended(slot, tasks)
                why = "no requests" if slot.may_run else "others need its memory"
                slot.is_ending, ending_s = True, time.monotonic()
                self._changed.notify()
            print_progress(f"{name} has ended in {time.monotonic() - ending_s:.2f} s: {why}")
            slot.child, slot.is_ready, slot.is_ending = None, False, False
            self._changed.notify()

    def _name_of(self, slot: RouterSlot) -> str:
        return f"the router of {self.model}" + (f" ({slot.name})" if slot.index else "")

    def _announce_start(self, slot: RouterSlot, name: str) -> None:
        waited_s = 0.0
        if self._waiting_since_s is not None:
            waited_s = time.monotonic() - self._waiting_since_s
        print_progress(f"{name} starts, {waited_s:.2f} s after it was asked for")
        if slot.index == 0 and self._on_wake is not None:
            self._tasks.start(self._on_wake())

    async def _until_ended(self, slot: RouterSlot, tasks: Sequence[asyncio.Task[Never]]) -> None:
        """Return once the router is not wanted and no gateway has a request of it."""
        while True:
            await _first_of(self._changed.wait_for(lambda: not self._is_wanted(slot)), tasks)
            slot.is_leaving = True
            self._announce()
            ended = self._links.wait_until_unused(
                self.model, slot.name, unless=lambda: self._is_wanted(slot)
            )
            await _first_of(ended, tasks)
            if not self._is_wanted(slot):
                return
            slot.is_leaving = False
            self._announce()

    async def _probe(self, slot: RouterSlot, child: SupervisedChild) -> Never:
        """Follow whether a router answers."""
        started_s = time.monotonic()
        while True:
            await slot.wait_until_healthy()
            pid = child.pid
            if self.has_started.is_set() and started_s:
                took_s, started_s = time.monotonic() - started_s, 0.0
                print_progress(f"{self._name_of(slot)} takes requests, after {took_s:.2f} s")
            slot.is_ready = child.has_started = True
            if not self.has_started.is_set():
                self._last_used_s = time.monotonic()
                self.has_started.set()
            self._announce()
            while child.pid == pid:  # noqa: ASYNC110  # of a child that says nothing
                await asyncio.sleep(PID_INTERVAL_S)
            slot.is_ready = False
            self._announce()

    def _announce(self) -> None:
        """Tell the gateways which routers take requests."""
        running = self._running
        if running:
            self._waiting_since_s = None
        if self._links.announce(self.model, running):
            self._on_running(len(running))
        self._changed.notify()

    async def _tick(self) -> Never:
        while True:
            await asyncio.sleep(TICK_S)
            if not self.has_started.is_set():
                continue  # how long its start takes is no idle time
            n_running = sum(slot.pid is not None for slot in self.slots)
            self._scaler.tick(time.time(), n_ready=n_running)
            self._changed.notify()


@asynccontextmanager
async def scaled_routers(
    routers: ScaledRouters,
) -> AsyncIterator[tuple[ScaledRouters, asyncio.Task[Never]]]:
    """Start and stop routers by demand for the lifetime of the context.

    Yields:
        The routers, and a task that raises CommandError once one cannot be started any more.
    """
    task = asyncio.create_task(routers.run())
    try:
        yield routers, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def _first_error() -> AsyncIterator[list[asyncio.Task[Never]]]:
    """Collect tasks; at the end raise the error of one that has failed, and cancel the others."""
    tasks: list[asyncio.Task[Never]] = []
    try:
        yield tasks
        for task in tasks:
            if task.done():
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _first_of(work: Awaitable[None], tasks: Sequence[asyncio.Task[Never]]) -> None:
    """Wait for work; raises the error of a task that fails meanwhile."""
    waiter = asyncio.ensure_future(work)
    try:
        await asyncio.wait({waiter, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
    finally:
        waiter.cancel()
