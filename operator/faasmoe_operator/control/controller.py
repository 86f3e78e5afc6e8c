"""The control loop of one model: observe, decide, act.

A reconcile pass computes the sandbox plan from the recorded state, starts its actions and publishes
the routing table. It runs once a second after the autoscalers' decisions, immediately on an
activation request, and a few milliseconds after an action ends, so that actions that end together
share one pass. An idle model has neither passes nor decisions (see `ticker.py`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from faasmoe_contracts.control_messages import LoadReport
from faasmoe_contracts.usage import UsageReport
from faasmoe_operator.aio import ChangeNotifier
from faasmoe_operator.control.activation_trace import ActivationTrace
from faasmoe_operator.control.autoscalers import FunctionAutoscalers, ReplicaChange
from faasmoe_operator.control.executor import ActionExecutor, ExecutorContext
from faasmoe_operator.control.fleet import Fleet
from faasmoe_operator.control.function_memory import FunctionMemory
from faasmoe_operator.control.function_stats import FunctionStats
from faasmoe_operator.control.live import ModelActivity, PrivacySettings
from faasmoe_operator.control.load_reports import LoadReports
from faasmoe_operator.control.machine_memory import SharedMemory
from faasmoe_operator.control.metrics import ControlPlaneMetrics
from faasmoe_operator.control.model import ControlledModel
from faasmoe_operator.control.routing_table import RoutingTablePublisher
from faasmoe_operator.control.sandbox_client import SandboxClient
from faasmoe_operator.control.sandbox_prober import SandboxProber
from faasmoe_operator.control.ticker import Ticker, idle_until
from faasmoe_operator.control.usage_ledger import UsageLedger
from faasmoe_operator.plan.fleet import FleetSettings, FunctionDemand
from faasmoe_operator.plan.sandboxes import plan_sandboxes
from faasmoe_operator.platforms.base import Platform
from faasmoe_tracing import NO_TRACER, Tracer

SUSPENDED_AFTER_S = 5.0  # without a tick or a load report although there is load
UNKNOWN_CONCURRENCY = 0.001  # of an active function whose load is unknown: keeps one replica

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ControllerTiming:
    """Intervals and timeouts of a controller and its background tasks.

    Attributes:
        tick_s: seconds between two autoscaler decisions; routers report load once a second.
        coalesce_s: seconds between the end of an action and the reconcile pass that it causes.
        drain_s: seconds between the removal of an address from the routing table and the detach,
            for calls in flight.
        probe_interval_s: seconds between two probes of a sandbox.
        start_deadline_s: how long a sandbox may take to become ready.
        activation_deadline_s: after how long an activation counts as timed out in the metrics.
        adopt_timeout_s: how long to wait at startup for the function lists of existing sandboxes.
            As long as it takes to mark an unresponsive sandbox as failed, because functions that
            are not listed are attached a second time.
        popularity_save_interval_s: minimum seconds between two writes of the popularity.
        usage_save_interval_s: seconds from a change of the tenants' usage until it is saved.
        read_ahead_interval_s: seconds between two read-aheads while idle.
        log_interval_s: minimum seconds between two log lines about changed state.
    """

    tick_s: float = 1.0
    coalesce_s: float = 0.005
    drain_s: float = 1.0
    probe_interval_s: float = 5.0
    start_deadline_s: float = 60.0
    activation_deadline_s: float = 60.0
    adopt_timeout_s: float = 15.0
    popularity_save_interval_s: float = 30.0
    usage_save_interval_s: float = 10.0
    read_ahead_interval_s: float = 60.0
    log_interval_s: float = 0.5


class SharedPool(Protocol):
    """Sandboxes that several models take; SandboxPool."""

    @property
    def size(self) -> int:
        """Number of generic processes that it keeps ready."""
        ...

    @property
    def n_generic(self) -> int:
        """Number of processes that are no model's."""
        ...

    @property
    def n_sharing(self) -> int:
        """Number of models that share processes at present; at least 1."""
        ...

    def n_models(self, sandbox_id: str) -> int:
        """Return how many models share a process."""
        ...


class Controller:
    """Scales and places the functions of one model: call `start`, then `run` until cancelled.

    Args:
        model: the model.
        platform: runs sandboxes.
        client: calls sandboxes.
        timing: intervals and timeouts.
        popularity: decayed row counts of an earlier run, by `ManagedFunction.stable_key`.
        usage_ledger: the tenants' usage of an earlier run.
        metrics: metrics of an earlier run, whose counters go on; None starts at zero.
        privacy: how much of single functions is shown on the live page.
        memory: the machine's memory, which the model shares with others; None for no limit.
        tracer: traces activations.
        shared_pool: the pool of sandboxes that several models share; None if they are the model's
            own.
        clock: monotonic time in seconds.
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
        metrics: ControlPlaneMetrics | None = None,
        privacy: PrivacySettings | None = None,
        memory: SharedMemory | None = None,
        tracer: Tracer = NO_TRACER,
        shared_pool: SharedPool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        now = clock()
        self.model = model
        self.timing = timing or ControllerTiming()
        self.clock = clock
        self.metrics = metrics or ControlPlaneMetrics()
        self.fleet = Fleet(model.functions, template=model.template)
        self.routing_table = RoutingTablePublisher(
            list(model.specs.values()), model_digest=model.store.model_digest
        )
        self.load_reports = LoadReports(now=now)
        self.usage_ledger = UsageLedger(time.time()) if usage_ledger is None else usage_ledger
        self.usage_changed = ChangeNotifier()
        self.function_stats = FunctionStats(model.functions, rows=popularity, now=now)
        self.activity = ModelActivity(
            model.functions, rows_per_token=model.rows_per_token, now=now, settings=privacy
        )
        self.autoscalers = FunctionAutoscalers(
            tuple(model.functions.values()), observed=None, now=now
        )
        self._activation_trace = ActivationTrace(tracer, model.name)
        self._memory = memory
        self._shared_pool = shared_pool
        self.revision = 0
        """Increases with everything that may have changed the state, as each reconcile pass."""
        self._revision_notifier = ChangeNotifier()
        self._platform = platform
        self._ticker = Ticker(self.timing.tick_s, idle_until=self._idle_until, clock=clock)
        self._last_event_at = now  # last tick, load report or activation request
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
                activation_trace=self._activation_trace,
                drain_s=lambda: self.timing.drain_s if self.routing_table.n_watchers else 0.0,
            ),
        )
        self._prober = SandboxProber(
            model, client, fleet=self.fleet, executor=self._executor, clock=clock
        )
        self.function_memory = FunctionMemory(
            model,
            self.fleet,
            self.function_stats,
            self._executor,
            clock,
            scale_to_zero=lambda names: self.autoscalers.release(names, now=clock()),
            publish=self.publish,
            request_reconcile=self._request_reconcile,
            n_sharing=lambda: 1 if shared_pool is None else shared_pool.n_sharing,
        )
        self._fleet_settings = FleetSettings(
            model.template.digest,
            warm_pool=model.warm_pool,
            start_deadline_s=self.timing.start_deadline_s,
            memory_limit_bytes=model.memory_limit_bytes,
        )

    def generic_sandboxes(self) -> tuple[int, int]:
        """Return how many generic sandboxes there should be, and how many are ready."""
        if self._shared_pool is not None:
            return self._shared_pool.size, self._shared_pool.n_generic
        return self.model.warm_pool, self.fleet.n_generic()

    def n_models(self, sandbox_id: str) -> int:
        """Return how many models share the process of a sandbox; 1 if it is the model's own."""
        return 1 if self._shared_pool is None else self._shared_pool.n_models(sandbox_id)

    async def start(self) -> None:
        """Adopt the sandboxes of an earlier run together with their functions."""
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
            logger.info("adopted %d sandboxes with %d functions", found, ready)

    async def run(self) -> None:
        """Run the control loop until cancelled; sandboxes complete the calls in flight."""
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

    def activate(self, functions: Iterable[str], *, traceparent: str = "") -> None:
        """Scale functions up from zero and start the attaches that are possible immediately.

        Args:
            functions: the functions.
            traceparent: the span of a request that waits for them; empty if it is not traced.
        """
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
        self._trace_activation(functions, traceparent, now)
        # A function that is waiting for memory is desired already, but the request makes it recent.
        if changes or self._fleet_settings.is_memory_limited or self._memory is not None:
            self._ticker.notify()
            self.reconcile()

    def _trace_activation(self, functions: tuple[str, ...], traceparent: str, now: float) -> None:
        started_s = self.function_stats.activating_since(functions)
        if started_s:
            self._activation_trace.begin(
                started_s, traceparent=traceparent, started_s=min(started_s.values()), now_s=now
            )

    def warm_up(self) -> None:
        """Activate the functions that were used lately, as a router starts that will use them."""
        self.activate(self.function_memory.functions_to_warm())

    def add_load_report(self, report: LoadReport) -> None:
        """Record a router's load report."""
        now = self.clock()
        self.metrics.load_reports.inc()
        if report.has_load or self.load_reports.had_load():
            self._backfill_load(now)  # the previous load lasted until now
        if self.load_reports.add(report, now=now):
            self._bump_revision()
        self.function_stats.add_load_report(report, now=now)
        self.activity.add_load_report(report)
        if report.has_load:
            self._ticker.notify()

    def add_usage_report(self, report: UsageReport) -> None:
        """Record a router's report of its tenants' usage."""
        self.usage_ledger.add_report(report)
        self.usage_changed.notify()

    @property
    def failure(self) -> str:
        """Why sandboxes cannot be created or used; empty if they can."""
        return self._executor.failures.message

    async def wait_for_change(self, revision: int) -> None:
        """Wait until the state may have changed since `revision`."""
        await self._revision_notifier.wait_for(lambda: self.revision != revision)

    def reconcile(self) -> None:
        """Run one reconcile pass: plan, start the planned actions and publish the routing table."""
        now = self.clock()
        self._activation_trace.record_plan(now)
        corrupted = self._executor.corrupted
        desired = {
            name: 0 if corrupted.is_backing_off(name, now) else self.autoscalers.desired(name)
            for name in self.model.functions
        }
        self._executor.cancel_detaches(desired)
        settings = replace(
            self._fleet_settings,
            shape=self.fleet.new_sandbox_shape(now=now),
            machine=None if self._memory is None else self._memory.view(),
        )
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
        if self._memory is not None:
            self._memory.settle(plan.claims, plan.evicted_elsewhere)
        self._executor.failures.record_memory_pressure(
            self.function_stats.activating(),
            waiting=plan.waiting_for_memory,
            too_large=plan.unschedulable,
        )
        self.publish()

    def publish(self) -> None:
        """Publish the addresses of all attached functions in the routing table."""
        now = self.clock()
        self.routing_table.publish(self.fleet.addresses())
        self._record_activations(now)
        desired = {name: self.autoscalers.desired(name) for name in self.model.functions}
        self.activity.observe(
            ready=self.fleet.ready_replicas(),
            desired={name: count for name, count in desired.items() if count},
            sandboxes=(record.sandbox.id for record in self.fleet.sandboxes),
            now=now,
        )
        self._bump_revision()

    def tick(self) -> None:
        """Pass the last second's load to the autoscalers, let them decide and request a pass."""
        now = self.clock()
        self._backfill_load(now)
        self.autoscalers.observe(self._current_load(now), now=now)
        self._count_decisions(self.autoscalers.decide(self.fleet.ready_replicas(), now=now))
        self._count_late_activations(now)
        self._plan_due = True
        self._work_due.set()

    def _count_late_activations(self, now: float) -> None:
        """Count activations past their deadline, whether or not requests still wait for them."""
        late = self.function_stats.newly_late_activations(
            self.timing.activation_deadline_s, now=now
        )
        self.metrics.activations.labels("timed_out").inc(len(late))
        for function in self.function_stats.activating():
            if self.autoscalers.desired(function) == 0:
                self.function_stats.finish_activation(function, now=now)
                self._activation_trace.record_abandoned([function], now)

    def _backfill_load(self, now: float) -> None:
        """Record the last reported load for the seconds in which there was no tick."""
        if now - self._last_event_at > SUSPENDED_AFTER_S and self.load_reports.had_load():
            # The ticker only idles without load, so this process was suspended.
            logger.warning("control process was suspended for %.0f s", now - self._last_event_at)
            self.load_reports.skip_suspension(self._last_event_at, now)
        self._last_event_at = now
        if self.autoscalers.has_unobserved_seconds(now):
            self.autoscalers.backfill(self._current_load(now), now=now)

    def _current_load(self, now: float) -> Mapping[str, float] | None:
        """Return each function's calls in flight, or None if no router has reported.

        If a router with load does not report any more, functions that sandboxes computed recently
        count as loaded as well.
        """
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
        finished = [name for name in waiting if name in ready]
        times = [self.function_stats.finish_activation(name, now=now) for name in finished]
        self._activation_trace.record_ready(finished, now)
        self.activity.add_activations(times, now=now)
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
