"""How often the control does what, and how long it waits.

The control loop: observe, decide, act. The one writer of everything that it decides.

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
from dataclasses import dataclass, replace
from typing import Any

from faasmoe_operator.control.autoscalers import FunctionAutoscalers, ReplicaChange
from faasmoe_operator.control.executor import ActionExecutor, ExecutorContext
from faasmoe_operator.control.fleet import Fleet
from faasmoe_operator.control.function_stats import FunctionStats
from faasmoe_operator.control.load_reports import LoadReport, LoadReports
from faasmoe_operator.control.metrics import ControlPlaneMetrics
from faasmoe_operator.control.model import ControlledModel
from faasmoe_operator.control.routing_table import RoutingTablePublisher
from faasmoe_operator.control.sandbox_client import SandboxClient
from faasmoe_operator.control.sandbox_prober import SandboxProber
from faasmoe_operator.control.ticker import Ticker, idle_until
from faasmoe_operator.control.usage_ledger import UsageLedger, UsageReport
from faasmoe_operator.plan.fleet import FleetSettings, FunctionDemand
from faasmoe_operator.plan.sandboxes import plan_sandboxes
from faasmoe_operator.platforms.base import Platform
from faasmoe_operator.platforms.registry import ChangeNotifier as Notice

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ControllerTiming:
    """Periods and deadlines.

    Attributes:
        tick_s: between two decisions of the autoscalers, as routers report once a second.
        coalesce_s: for finished actions to gather before the next round and table change.
        drain_s: between a function's address leaving the table and its detach, for calls that are
            on their way.
        probe_interval_s: between two inspections of a sandbox.
        start_deadline_s: for a sandbox to become ready.
        adopt_timeout_s: for sandboxes found at the start to tell what they hold: as long as it
            takes to give up one that is silent, for what is not told is attached once more.
        save_interval_s: between two writes of the popularity, at least.
        accounts_interval_s: from a change of the tenants' accounts to its being written.
        read_ahead_interval_s: between two read-aheads while idle.
        tell_interval_s: between two log lines that say what has changed, at least.
    """

    tick_s: float = 1.0
    coalesce_s: float = 0.005
    drain_s: float = 1.0
    probe_interval_s: float = 5.0
    start_deadline_s: float = 60.0
    adopt_timeout_s: float = 15.0
    popularity_save_interval_s: float = 30.0
    usage_save_interval_s: float = 10.0
    read_ahead_interval_s: float = 60.0
    log_interval_s: float = 0.5


SUSPENDED_AFTER_S = 5.0  # without a tick or a report, though there is load
UNKNOWN_CONCURRENCY = 0.001  # of a function that is used, nobody says how much: one replica stays


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
        timing: ControllerTiming | None = None,
        popularity: Mapping[str, float] | None = None,
        usage_ledger: UsageLedger | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        now = clock()
        self.model = model
        self.timing = timing or ControllerTiming()
        self.clock = clock
        self.metrics = ControlPlaneMetrics()
        self.fleet = Fleet(model.functions, template=model.template)
        self.routing_table = RoutingTablePublisher(
            list(model.specs.values()), model_digest=model.store.model_digest
        )
        self.load_reports = LoadReports(now=now)
        self.usage_ledger = UsageLedger(time.time()) if usage_ledger is None else usage_ledger
        self.usage_changed = Notice()
        self.function_stats = FunctionStats(model.functions, rows=popularity, now=now)
        self.autoscalers = FunctionAutoscalers(
            tuple(model.functions.values()), observed=None, now=now
        )
        self.revision = 0
        """Counts what may have changed the state: rounds, and actions that ended."""
        self._revision_notifier = Notice()
        self._platform = platform
        self._ticker = Ticker(self.timing.tick_s, idle_until=self._idle_until, clock=clock)
        self._last_event_at = now  # the last time at which anybody could be heard
        self._work_due = asyncio.Event()
        self._plan_due = False
        self._executor = ActionExecutor(
            self.fleet,
            ExecutorContext(
                model,
                platform,
                client,
                self.metrics,
                clock,
                on_change=self._request_reconcile,
                on_attached=self._work_due.set,
                drain_s=lambda: self.timing.drain_s if self.routing_table.n_watchers else 0.0,
            ),
        )
        self._prober = SandboxProber(
            model, client, fleet=self.fleet, executor=self._executor, clock=clock
        )
        self._fleet_settings = FleetSettings(
            model.template.digest,
            warm_pool=model.warm_pool,
            start_deadline_s=self.timing.start_deadline_s,
            memory_limit_bytes=model.memory_limit_bytes,
        )

    async def start(self) -> None:
        """Read back what runs: assignments from the sandboxes that an earlier control left."""
        self._executor.sync_sandboxes(await self._platform.list())
        found = len(self.fleet.sandboxes)
        try:
            async with asyncio.timeout(self.timing.adopt_timeout_s):
                await self._prober.read_back_all(self._platform)
        except TimeoutError:
            logger.warning("not all of the %d sandboxes found responded in time", found)
        functions = tuple(self.model.functions.values())
        replicas = self.fleet.observed_replicas() if found else None
        self.autoscalers = FunctionAutoscalers(functions, observed=replicas, now=self.clock())
        self.routing_table.publish(self.fleet.addresses())
        if found:
            ready = sum(self.fleet.ready_replicas().values())
            logger.info("found %d sandboxes with %d functions", found, ready)

    async def run(self) -> None:
        """Run rounds until cancelled; then actions in flight are left to themselves."""
        self._request_reconcile()
        try:
            async with asyncio.TaskGroup() as group:
                for work in (self._reconcile_loop, self._probe_loop, self._watch_platform):
                    group.create_task(work())
                group.create_task(self._ticker.run(self.tick))
        finally:
            self.routing_table.close()
            await self._prober.stop()
            await self._executor.stop()

    def activate(self, functions: Iterable[str]) -> None:
        """Bring functions up from zero: what can be attached is attached at once."""
        now = self.clock()
        self.metrics.activation_requests.inc()
        self._backfill_load(now)
        functions = tuple(functions)
        changes = self.autoscalers.activate(functions, now=now)
        self._count_decisions(changes)
        for change in changes:
            self.function_stats.start_activation(change.function, now=now)
        for function in self.model.functions.keys() & set(functions):
            self.function_stats.record_request(function, now=now)
        if changes or self.model.memory_limit_bytes is not None:  # it may be wanted, without room
            self._ticker.notify()
            self.reconcile()

    def add_load_report(self, report: LoadReport) -> None:
        """Take a router's load report."""
        now = self.clock()
        self.metrics.load_reports.inc()
        if report.has_load or self.load_reports.had_load():
            self._backfill_load(now)  # until now it was as it was heard last
        if self.load_reports.add(report, now=now):
            self._bump_revision()
        self.function_stats.add_load_report(report, now=now)
        if report.has_load:
            self._ticker.notify()

    def add_usage_report(self, report: UsageReport) -> None:
        """Take what a router says that the tenants have used."""
        self.usage_ledger.add_report(report)
        self.usage_changed.notify()

    @property
    def failure(self) -> str:
        """Why sandboxes cannot be had or used; empty if they can."""
        return self._executor.failures.message

    async def wait_for_change(self, revision: int) -> None:
        """Wait until the state may have changed since this revision."""
        await self._revision_notifier.wait_for(lambda: self.revision != revision)

    def reconcile(self) -> None:
        """Plan and begin what is to be done, and publish where functions serve."""
        now = self.clock()
        corrupted = self._executor.corrupted
        desired = {
            name: 0 if corrupted.is_backing_off(name, now) else self.autoscalers.desired(name)
            for name in self.model.functions
        }
        self._executor.cancel_detaches(desired)
        settings = replace(self._fleet_settings, shape=self.fleet.new_sandbox_shape(now=now))
        if not self._executor.can_create(now):
            settings = replace(settings, max_creates=0)
        last_used = self.function_stats.last_used()
        plan = plan_sandboxes(
            settings,
            self._demands(desired, last_used),
            sandboxes=self.fleet.snapshot(last_used=last_used),
            now=now,
        )
        for action in plan.actions:
            self._executor.execute(action)
        self._executor.failures.record_memory_pressure(
            self.function_stats.activating(),
            waiting=plan.waiting_for_memory,
            too_large=plan.unschedulable,
        )
        self.publish()

    def publish(self) -> None:
        """Publish where functions serve."""
        self.routing_table.publish(self.fleet.addresses())
        self._record_activations(self.clock())
        self._bump_revision()

    def tick(self) -> None:
        """Let the autoscalers see the last second's load and decide."""
        now = self.clock()
        self._backfill_load(now)
        self.autoscalers.observe(self._current_load(now), now=now)
        self._count_decisions(self.autoscalers.decide(self.fleet.ready_replicas(), now=now))
        for function in self.function_stats.activating():
            if self.autoscalers.desired(function) == 0:
                self.function_stats.finish_activation(function, now=now)
                self.metrics.activations.labels("timed_out").inc()
        self._plan_due = True
        self._work_due.set()

    def _backfill_load(self, now: float) -> None:
        """Let the autoscalers know that what was heard last went on: a rest, or load."""
        if now - self._last_event_at > SUSPENDED_AFTER_S and self.load_reports.had_load():
            # It rests only without load: this process was stopped, and could hear nobody.
            logger.warning("control process was suspended for %.0f s", now - self._last_event_at)
            self.load_reports.skip_suspension(self._last_event_at, now)
        self._last_event_at = now
        if self.autoscalers.has_unobserved_seconds(now):
            self.autoscalers.backfill(self._current_load(now), now=now)

    def _current_load(self, now: float) -> Mapping[str, float] | None:
        """Return each function's calls in flight: as routers say, or sandboxes if one cannot."""
        loads = self.load_reports.concurrency(now)
        if loads is None or not self.load_reports.has_lost_router_with_load(now):
            return loads
        return {
            **dict.fromkeys(self._prober.activity.recently_active(now), UNKNOWN_CONCURRENCY),
            **loads,
        }

    def _demands(
        self, desired: Mapping[str, int], last_used: Mapping[str, float]
    ) -> list[FunctionDemand]:
        functions = (
            (desired[name], self.model.functions[name])
            for name in self.function_stats.by_popularity()
        )
        return [
            FunctionDemand(
                function.id,
                replicas,
                function.size_bytes,
                function.anti_affinity_key,
                last_used=last_used.get(function.id, 0.0),
                pinned=function.scaling.min_scale > 0,
            )
            for replicas, function in functions
        ]

    def _count_decisions(self, changes: Iterable[ReplicaChange]) -> None:
        for change in changes:
            self.metrics.scale_decisions.labels(change.decision.reason).inc()

    def _record_activations(self, now: float) -> None:
        waiting = self.function_stats.activating()
        ready = self.fleet.ready_replicas() if waiting else {}
        times = [
            self.function_stats.finish_activation(name, now=now)
            for name in waiting
            if name in ready
        ]
        for waited_s in times:
            self.metrics.activations.labels("ready").inc()
            self.metrics.cold_start_seconds.observe(waited_s or 0.0)

    async def _reconcile_loop(self) -> None:
        while True:
            await self._work_due.wait()
            await asyncio.sleep(self.timing.coalesce_s)
            self._work_due.clear()
            if self._plan_due:
                self._plan_due = False
                self.reconcile()
            else:
                self.publish()

    def _request_reconcile(self) -> None:
        self._plan_due = True
        self._work_due.set()
        self._ticker.notify()

    def _bump_revision(self) -> None:
        self.revision += 1
        self._revision_notifier.notify()

    def _idle_until(self, now: float) -> float | None:
        if self._work_due.is_set():
            return None
        return idle_until(
            now,
            fleet=self.fleet,
            autoscalers=self.autoscalers,
            load_reports=self.load_reports,
            function_stats=self.function_stats,
            executor=self._executor,
            start_deadline_s=self.timing.start_deadline_s,
        )

    async def _probe_loop(self) -> None:
        while True:
            await asyncio.sleep(self.timing.probe_interval_s)
            await self._prober.probe_all()

    async def _watch_platform(self) -> None:
        async for _ in self._platform.watch():
            self._executor.sync_sandboxes(await self._platform.list())
            self._prober.start_read_back()
