"""Routers that end while nobody uses their model, and start with its next request.

The gateway reports what is waiting and running (`faasmoe_contracts.router_demand`) and keeps the
requests meanwhile. When a router ends and starts is the autoscaler's decision (`scaling/`), the
same as for functions, with at most one replica.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Never

from faasmoe_contracts.json_reader import ContractError
from faasmoe_contracts.router_demand import MAX_LINE_BYTES, RouterDemand
from faasmoe_operator.api.v1alpha1.router import RouterScalingSpec
from faasmoe_operator.cli.local_stack import SupervisedContext
from faasmoe_operator.cli.logs import print_progress
from faasmoe_operator.cli.supervisor import SupervisedChild
from faasmoe_operator.scaling import FunctionAutoscaler, ScalingSettings

logger = logging.getLogger(__name__)

TICK_S = 1.0


class RouterScaler:
    """Decides whether a router runs; time is an argument, in seconds.

    Args:
        spec: when it ends.
        now: current time.
    """

    def __init__(self, spec: RouterScalingSpec, now: float) -> None:
        settings = ScalingSettings(
            min_scale=spec.min_replicas,
            max_scale=1,
            target=1.0,
            window_s=float(spec.idle_seconds),
            scale_to_zero_grace_period_s=0.0,
        )
        # It has just been started, to find what is wrong with it.
        self._scaler = FunctionAutoscaler.restored(settings, replicas=1, ready=1, now=now)
        self._n_requests = 0

    @property
    def is_wanted(self) -> bool:
        """Whether the router should run."""
        return self._scaler.desired > 0

    def set_demand(self, n_requests: int, now: float) -> None:
        """Take the number of requests that wait or run; the first one starts the router."""
        self._n_requests = n_requests
        if n_requests and not self.is_wanted:
            self._scaler.activate(now)

    def tick(self, now: float, *, is_running: bool) -> None:
        """Decide anew; to be called once a second."""
        self._scaler.observe(math.floor(now), float(self._n_requests))
        self._scaler.decide(now, ready=int(is_running))


class ScaledRouter:
    """A router that is started and stopped; created by `scaled_router`.

    Attributes:
        scaler: decides whether it runs.
        has_started: whether it has worked once; set by whoever checks that. It does not end before.
    """

    def __init__(self, scaler: RouterScaler) -> None:
        self.scaler = scaler
        self.has_started = False
        self._child: SupervisedChild | None = None
        self._changed = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """Process id; None while it does not run."""
        return None if self._child is None else self._child.pid

    def set_demand(self, n_requests: int) -> None:
        """Take the number of requests that wait or run."""
        self.scaler.set_demand(n_requests, time.time())
        self._changed.set()

    async def run(self, start: Callable[[], SupervisedContext], name: str) -> Never:
        """Start and stop the router until cancelled; raises CommandError as a child does."""
        ticks = asyncio.create_task(self._tick())
        try:
            while True:
                async with start() as (self._child, failure):
                    self._child.has_started = self.has_started
                    await self._until(wanted=False, failure=failure)
                    print_progress(f"{name} ends: no requests")
                self._child = None
                await self._until(wanted=True, failure=ticks)
                print_progress(f"{name} starts")
        finally:
            ticks.cancel()
            await asyncio.gather(ticks, return_exceptions=True)

    async def _until(self, *, wanted: bool, failure: asyncio.Task[Never]) -> None:
        while self.scaler.is_wanted != wanted:
            self._changed.clear()
            waiter = asyncio.create_task(self._changed.wait())
            try:
                await asyncio.wait({waiter, failure}, return_when=asyncio.FIRST_COMPLETED)
                if failure.done():
                    await failure
            finally:
                waiter.cancel()

    async def _tick(self) -> Never:
        while True:
            await asyncio.sleep(TICK_S)
            if not self.has_started:
                continue  # how long its start takes is no idle time
            if self._child is not None:
                self._child.has_started = True
            self.scaler.tick(time.time(), is_running=self.pid is not None)
            self._changed.set()


@asynccontextmanager
async def scaled_router(
    spec: RouterScalingSpec, start: Callable[[], SupervisedContext], name: str
) -> AsyncIterator[tuple[ScaledRouter, asyncio.Task[Never]]]:
    """Start and stop a router by demand for the lifetime of the context.

    Args:
        spec: when it ends.
        start: returns the context in which it runs.
        name: its name for messages.

    Yields:
        The router, and a task that raises CommandError once it cannot be started any more.
    """
    scaled = ScaledRouter(RouterScaler(spec, time.time()))
    task = asyncio.create_task(scaled.run(start, name))
    try:
        yield scaled, task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def demand_listener(path: Path, routers: Mapping[str, ScaledRouter]) -> AsyncIterator[None]:
    """Listen for the gateway's reports for the lifetime of the context.

    Args:
        path: Unix socket to listen on.
        routers: the routers by model.
    """

    async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await reader.readline():
                demand = RouterDemand.loads(line)
                for model, scaled in routers.items():
                    scaled.set_demand(demand.get(model, 0))
        except (ContractError, ValueError, OSError) as error:
            logger.error("The gateway's demand cannot be read: %s", error)
        finally:
            writer.close()
            for scaled in routers.values():
                scaled.set_demand(0)  # its requests have ended with it

    server = await asyncio.start_unix_server(read, str(path), limit=MAX_LINE_BYTES)
    try:
        yield
    finally:
        server.close()
