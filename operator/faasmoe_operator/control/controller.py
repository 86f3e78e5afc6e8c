"""The control loop: observe, decide, act. The one writer of everything that it decides.

A round runs when something changed (a wake at once, the end of an action after a few milliseconds,
in which more of them end) and every second, when the autoscalers decide. In each round the sandbox
plan is made anew from what is written down, its actions begin, and the function table is published.
A model at rest has neither rounds nor decisions (`rest.py`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from faasmoe_operator.control.actuator import Actuator, Surroundings
from faasmoe_operator.control.fleet import Fleet
from faasmoe_operator.control.inspector import Inspector
from faasmoe_operator.control.ledger import Ledger, Statement
from faasmoe_operator.control.metrics import ControlMetrics
from faasmoe_operator.control.model import ControlledModel
from faasmoe_operator.control.pulse import Pulse
from faasmoe_operator.control.records import Records
from faasmoe_operator.control.reports import LoadReport, Reports
from faasmoe_operator.control.rest import rests_until
from faasmoe_operator.control.sandbox_client import SandboxClient
from faasmoe_operator.control.scalers import Change, Scalers
from faasmoe_operator.control.table_feed import TableFeed
from faasmoe_operator.control.timing import Timing
from faasmoe_operator.plan.fleet import Demand, FleetSettings
from faasmoe_operator.plan.sandboxes import plan_sandboxes
from faasmoe_operator.platforms.base import Platform
from faasmoe_operator.platforms.roster import Change as Notice

logger = logging.getLogger(__name__)

STOPPED_S = 5.0  # without a tick or a report, though there is load
SOME_LOAD = 0.001  # of a function that is used, nobody says how much: one replica stays


class Controller:
    """Looks after the functions of one model: `start`, then `run` until cancelled.

    Args:
        model: the model.
        platform: runs sandboxes.
        client: talks to sandboxes.
        timing: periods and deadlines.
        popularity: rows of each function's shape from an earlier run.
        ledger: the tenants' accounts from an earlier run.
        clock: a clock that only goes forward.
    """

    def __init__(
        self,
        model: ControlledModel,
        platform: Platform[Any],
        client: SandboxClient,
        *,
        timing: Timing | None = None,
        popularity: Mapping[str, float] | None = None,
        ledger: Ledger | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        now = clock()
        self.model = model
        self.timing = timing or Timing()
        self.clock = clock
        self.metrics = ControlMetrics()
        self.fleet = Fleet(model.functions, template=model.template)
        self.feed = TableFeed(list(model.specs.values()), model_digest=model.store.model_digest)
        self.reports = Reports(now=now)
        self.ledger = Ledger(time.time()) if ledger is None else ledger
        self.ledger_changed = Notice()
        self.records = Records(model.functions, rows=popularity, now=now)
        self.scalers = Scalers(tuple(model.functions.values()), found=None, now=now)
        self.revision = 0
        """Counts what may have changed the state: rounds, and actions that ended."""
        self._revised = Notice()
        self._platform = platform
        self._pulse = Pulse(self.timing.tick_s, rests_until=self._rests_until, clock=clock)
        self._heard = now  # the last time at which anybody could be heard
        self._due = asyncio.Event()
        self._plan_due = False
        self._actuator = Actuator(
            self.fleet,
            Surroundings(
                model,
                platform,
                client,
                self.metrics,
                clock,
                changed=self._change,
                attached=self._due.set,
                drain_s=lambda: self.timing.drain_s if self.feed.n_followers else 0.0,
            ),
        )
        self._inspector = Inspector(
            model, client, fleet=self.fleet, actuator=self._actuator, clock=clock
        )
        self._settings = FleetSettings(
            model.template.digest,
            warm_pool=model.warm_pool,
            start_deadline_s=self.timing.start_deadline_s,
            memory_limit_bytes=model.memory_limit_bytes,
        )

    async def start(self) -> None:
        """Read back what runs: assignments from the sandboxes that an earlier control left."""
        self._actuator.see(await self._platform.list())
        found = len(self.fleet.members)
        try:
            async with asyncio.timeout(self.timing.adopt_timeout_s):
                await self._inspector.read_back_all(self._platform)
        except TimeoutError:
            logger.warning("not all of %d sandboxes found have answered", found)
        functions = tuple(self.model.functions.values())
        replicas = self.fleet.found() if found else None
        self.scalers = Scalers(functions, found=replicas, now=self.clock())
        self.feed.publish(self.fleet.addresses())
        if found:
            ready = sum(self.fleet.ready().values())
            logger.info("found %d sandboxes with %d functions", found, ready)

    async def run(self) -> None:
        """Run rounds until cancelled; then actions in flight are left to themselves."""
        self._change()
        try:
            async with asyncio.TaskGroup() as group:
                for work in (self._rounds, self._inspections, self._watch):
                    group.create_task(work())
                group.create_task(self._pulse.run(self.tick))
        finally:
            self.feed.close()
            await self._inspector.end()
            await self._actuator.end()

    def wake(self, functions: Iterable[str]) -> None:
        """Bring functions up from zero: what can be attached is attached at once."""
        now = self.clock()
        self.metrics.wakes.inc()
        self._catch_up(now)
        functions = tuple(functions)
        changes = self.scalers.wake(functions, now=now)
        self._count(changes)
        for change in changes:
            self.records.woken(change.function, now=now)
        for function in self.model.functions.keys() & set(functions):
            self.records.asked(function, now=now)
        if changes or self.model.memory_limit_bytes is not None:  # it may be wanted, without room
            self._pulse.rouse()
            self.round()

    def take(self, report: LoadReport) -> None:
        """Take a router's load report."""
        now = self.clock()
        self.metrics.reports.inc()
        if report.is_busy or self.reports.was_busy():
            self._catch_up(now)  # until now it was as it was heard last
        if self.reports.take(report, now=now):
            self._revise()
        self.records.take(report, now=now)
        if report.is_busy:
            self._pulse.rouse()

    def settle(self, statement: Statement) -> None:
        """Take what a router says that the tenants have used."""
        self.ledger.take(statement)
        self.ledger_changed.notify()

    @property
    def trouble(self) -> str:
        """Why sandboxes cannot be had or used; empty if they can."""
        return self._actuator.troubles.text

    async def beyond(self, revision: int) -> None:
        """Wait until the state may have changed since this revision."""
        await self._revised.wait_for(lambda: self.revision != revision)

    def round(self) -> None:
        """Plan and begin what is to be done, and publish where functions serve."""
        now = self.clock()
        spoiled = self._actuator.spoiled
        wanted = {
            name: 0 if spoiled.is_waiting(name, now) else self.scalers.desired(name)
            for name in self.model.functions
        }
        self._actuator.keep_leaving(wanted)
        settings = replace(self._settings, shape=self.fleet.shape_of_new(now=now))
        if not self._actuator.may_create(now):
            settings = replace(settings, max_creates=0)
        used = self.records.last_used()
        plan = plan_sandboxes(
            settings,
            self._demands(wanted, used),
            sandboxes=self.fleet.observed(last_used=used),
            now=now,
        )
        for action in plan.actions:
            self._actuator.begin(action)
        self._actuator.troubles.note_room(
            self.records.waiting(), waiting=plan.waiting, too_large=plan.unplaceable
        )
        self.publish()

    def publish(self) -> None:
        """Publish where functions serve."""
        self.feed.publish(self.fleet.addresses())
        self._note_activated(self.clock())
        self._revise()

    def tick(self) -> None:
        """Let the autoscalers see the last second's load and decide."""
        now = self.clock()
        self._catch_up(now)
        self.scalers.observe(self._loads(now), now=now)
        self._count(self.scalers.decide(self.fleet.ready(), now=now))
        for function in self.records.waiting():
            if self.scalers.desired(function) == 0:
                self.records.activated(function, now=now)
                self.metrics.activations.labels("timed_out").inc()
        self._plan_due = True
        self._due.set()

    def _catch_up(self, now: float) -> None:
        """Let the autoscalers know that what was heard last went on: a rest, or load."""
        if now - self._heard > STOPPED_S and self.reports.was_busy():
            # It rests only without load: this process was stopped, and could hear nobody.
            logger.warning("no time passed for this control for %.0f s", now - self._heard)
            self.reports.bridge(self._heard, now)
        self._heard = now
        if self.scalers.are_behind(now):
            self.scalers.catch_up(self._loads(now), now=now)

    def _loads(self, now: float) -> Mapping[str, float] | None:
        """Return each function's calls in flight: as routers say, or sandboxes if one cannot."""
        loads = self.reports.sample(now)
        if loads is None or not self.reports.has_lost_one(now):
            return loads
        return {**dict.fromkeys(self._inspector.usage.lately(now), SOME_LOAD), **loads}

    def _demands(self, wanted: Mapping[str, int], used: Mapping[str, float]) -> list[Demand]:
        functions = ((wanted[name], self.model.functions[name]) for name in self.records.order())
        return [
            Demand(
                function.id,
                replicas,
                function.size_bytes,
                function.apart,
                last_used=used.get(function.id, 0.0),
                pinned=function.scaling.min_scale > 0,
            )
            for replicas, function in functions
        ]

    def _count(self, changes: Iterable[Change]) -> None:
        for change in changes:
            self.metrics.decisions.labels(change.decision.reason).inc()

    def _note_activated(self, now: float) -> None:
        waiting = self.records.waiting()
        ready = self.fleet.ready() if waiting else {}
        times = [self.records.activated(name, now=now) for name in waiting if name in ready]
        for waited_s in times:
            self.metrics.activations.labels("ready").inc()
            self.metrics.cold_start.observe(waited_s or 0.0)

    async def _rounds(self) -> None:
        while True:
            await self._due.wait()
            await asyncio.sleep(self.timing.coalesce_s)
            self._due.clear()
            if self._plan_due:
                self._plan_due = False
                self.round()
            else:
                self.publish()

    def _change(self) -> None:
        self._plan_due = True
        self._due.set()
        self._pulse.rouse()

    def _revise(self) -> None:
        self.revision += 1
        self._revised.notify()

    def _rests_until(self, now: float) -> float | None:
        if self._due.is_set():
            return None
        return rests_until(
            now,
            fleet=self.fleet,
            scalers=self.scalers,
            reports=self.reports,
            records=self.records,
            actuator=self._actuator,
            start_deadline_s=self.timing.start_deadline_s,
        )

    async def _inspections(self) -> None:
        while True:
            await asyncio.sleep(self.timing.probe_interval_s)
            await self._inspector.inspect()

    async def _watch(self) -> None:
        async for _ in self._platform.watch():
            self._actuator.see(await self._platform.list())
            self._inspector.begin_read_back()
