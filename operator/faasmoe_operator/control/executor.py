"""Executes planned actions: creates and deletes sandboxes, attaches and detaches functions.

Each action is recorded in the fleet before anything is sent, so that the next plan takes it into
account, and again when it ends. A sandbox that refuses a call, times out or violates the protocol
is marked as failed. Failures back off: sandbox creation as a whole, and functions whose weights are
corrupted one by one.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from faasmoe_contracts.backoff import Backoff, ExponentialBackoff
from faasmoe_operator.aio import TaskSet
from faasmoe_operator.control.activation_trace import ActivationTrace
from faasmoe_operator.control.fleet import Fleet
from faasmoe_operator.control.metrics import ControlPlaneMetrics
from faasmoe_operator.control.model import ControlledModel
from faasmoe_operator.control.sandbox_client import SandboxClient, SandboxClientError
from faasmoe_operator.errors import PlatformError, PlatformStopping
from faasmoe_operator.plan.actions import Action, ActionReason, Attach, Create, Delete, Detach
from faasmoe_operator.plan.fleet import AssignmentState, SandboxState
from faasmoe_operator.platforms.base import Platform, Sandbox

CORRUPTED_CODE = "corrupted"  # a sandbox's error code for damaged weights in the store
OUT_OF_MEMORY_CODE = "out_of_memory"  # its error code for a function that exceeds its memory limit

MAX_ATTACHES = 16  # of one call; so that the first layers need not wait for the last
MAX_REPLACED_ATTACHES = 4
"""Of functions that were lost: routers compute these meanwhile, and need the same processors."""
REPLACED_PAUSE_S = 0.03  # between such calls: a forward pass or two
LOST_S = 10.0  # for which routers compute what was lost
CREATE_BACKOFF_DELAYS_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
CREATE_BACKOFF_RESET_S = 120.0
CORRUPTED_INITIAL_BACKOFF_S = 1.0
CORRUPTED_MAX_BACKOFF_S = 60.0

AssignmentKey = tuple[str, str]
"""Id of a sandbox and id of a function."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ExecutorContext:
    """What an executor works with.

    Attributes:
        model: the model.
        platform: runs sandboxes.
        sandbox_client: calls sandboxes.
        metrics: counts actions and failures.
        clock: current time in seconds.
        on_change: called after a change that needs a reconcile pass.
        on_attached: called after an attach, so that the routing table is published.
        activation_trace: follows attaches.
        drain_s: returns the seconds between the removal of an address from the routing table and
            the detach; 0 if no router watches the table.
    """

    model: ControlledModel
    platform: Platform[Any]
    sandbox_client: SandboxClient
    metrics: ControlPlaneMetrics
    clock: Callable[[], float]
    on_change: Callable[[], None]
    on_attached: Callable[[], None]
    activation_trace: ActivationTrace
    drain_s: Callable[[], float]


class ActionExecutor:
    """Starts actions and tracks them until they end.

    Args:
        fleet: where actions and their results are recorded.
        context: what the executor works with.
    """

    def __init__(self, fleet: Fleet, context: ExecutorContext) -> None:
        self.failures = FailureTracker()
        """Why sandboxes cannot be created or used."""
        self.corrupted = CorruptedFunctionBackoff()
        """Functions whose weights in the store are corrupted."""
        self._fleet = fleet
        self._context = context
        self._tasks = TaskSet()
        self._pending_detaches: dict[AssignmentKey, asyncio.Event] = {}
        self._attach_queues: dict[str, deque[str]] = {}
        self._n_attaching = 0
        self._lost_at: dict[str, float] = {}  # functions of sandboxes that were lost
        self._create_backoff = Backoff(
            CREATE_BACKOFF_DELAYS_S, reset_after_s=CREATE_BACKOFF_RESET_S, coalesce=True
        )

    def can_create(self, now: float) -> bool:
        """Return whether sandboxes may be created; False while creation is backed off."""
        return not self._create_backoff.is_blocked(now)

    def create_allowed_at(self, now: float) -> float:
        """Return when a back-off of creation ends; infinity if there is none."""
        return math.inf if self.can_create(now) else self._create_backoff.blocked_until

    def execute(self, action: Action, *, drain_s: float | None = None) -> None:
        """Record an action in the fleet and start it.

        Args:
            action: the action.
            drain_s: seconds before a detach, for calls in flight; None for the usual ones.
        """
        self._context.metrics.sandbox_actions.labels(
            type(action).__name__.lower(), action.reason
        ).inc()
        match action:
            case Create():
                for _ in range(action.count):
                    name = self._fleet.start_creation(now=self._context.clock())
                    self._tasks.start(self._create(name))
            case Delete():
                self._delete(action)
            case Attach():
                self._fleet.set_function_state(
                    action.sandbox, action.function, AssignmentState.ATTACHING
                )
                self._attach(action.sandbox, action.function)
            case Detach():
                self._fleet.set_function_state(
                    action.sandbox, action.function, AssignmentState.DETACHING
                )
                cancelled = asyncio.Event()
                if action.reason is not ActionReason.MEMORY:  # its memory is reserved for another
                    self._pending_detaches[action.sandbox, action.function] = cancelled
                wait_s = self._context.drain_s() if drain_s is None else drain_s
                self._tasks.start(
                    self._detach(
                        action.sandbox, action.function, cancelled=cancelled, drain_s=wait_s
                    )
                )

    def cancel_detaches(self, desired: Mapping[str, int]) -> None:
        """Cancel detaches that are still draining if their functions are desired again."""
        live = self._live_replicas() if self._pending_detaches else {}
        for key in list(self._pending_detaches):
            sandbox, function = key
            record = self._fleet.get(sandbox)
            is_ready = record is not None and record.state is SandboxState.READY
            if is_ready and live.get(function, 0) < desired.get(function, 0):
                self._pending_detaches.pop(key).set()
                self._fleet.set_function_state(sandbox, function, AssignmentState.ATTACHED)
                live[function] = live.get(function, 0) + 1

    def mark_sandbox_failed(self, sandbox_id: str, *, cause: str, message: str) -> None:
        """Take a sandbox out of service permanently; the next plan deletes it.

        Args:
            sandbox_id: the sandbox.
            cause: label of the failure metric.
            message: what failed, for logs and status.
        """
        record = self._fleet.get(sandbox_id)
        if record is None or record.state in (SandboxState.FAILED, SandboxState.DRAINING):
            return
        logger.warning("sandbox %s failed and will be deleted: %s", sandbox_id, message)
        self.failures.record_failure(LifecycleStep.SERVE, f"sandbox {sandbox_id} failed: {message}")
        self._fleet.mark_failed(sandbox_id)
        self._count_failure(cause, was_ready=record.was_ready and cause != "attach")
        self._context.on_change()

    def sync_sandboxes(self, sandboxes: Sequence[Sandbox]) -> None:
        """Replace the fleet's sandboxes by those that the platform lists; missing ones are lost.

        A pass is made only if there is anything to plan with: a sandbox that starts or ends is
        listed several times on its way.
        """
        version = self._fleet.version
        for record in self._fleet.sync(sandboxes, now=self._context.clock()):
            if record.state not in (SandboxState.DRAINING, SandboxState.FAILED):
                how = "deleted by others" if record.sandbox.terminating else "lost"
                level = logging.INFO if record.sandbox.terminating else logging.WARNING
                sandbox, state = record.sandbox.id, record.state.value
                logger.log(level, "sandbox %s was %s while %s", sandbox, how, state)
                self._count_failure("lost", was_ready=record.was_ready)
                self._lost_at.update(dict.fromkeys(record.attached, self._context.clock()))
        if self._fleet.version != version:
            self._context.on_change()

    def record_sandbox_ready(self) -> None:
        """Record that a sandbox became ready."""
        self.failures.record_success(LifecycleStep.START)
        self._context.on_change()

    async def stop(self) -> None:
        """Stop tracking actions; sandboxes complete the calls that they have received."""
        await self._tasks.cancel_all()

    def _live_replicas(self) -> dict[str, int]:
        live: dict[str, int] = {}
        for record in self._fleet.sandboxes:
            if record.state is SandboxState.READY:
                for function, state in record.functions.items():
                    if state is not AssignmentState.DETACHING:
                        live[function] = live.get(function, 0) + 1
        return live

    def _count_failure(self, cause: str, *, was_ready: bool) -> None:
        self._context.metrics.sandbox_failures.labels(cause).inc()
        if not was_ready:  # a new sandbox would probably fail in the same way
            self._create_backoff.record_failure(self._context.clock())

    async def _create(self, name: str) -> None:
        sandbox: Sandbox | None = None
        try:
            sandbox = await self._context.platform.create(self._context.model.template)
        except PlatformStopping as error:
            logger.info("no sandbox is created: %s", error)
            self._create_backoff.record_failure(self._context.clock())
        except PlatformError as error:
            logger.warning("failed to create a sandbox: %s", error)
            self.failures.record_failure(LifecycleStep.CREATE, str(error))
            self._count_failure("create", was_ready=False)
        else:
            self.failures.record_success(LifecycleStep.CREATE)
        finally:
            sandboxes = await self._context.platform.list()
            self._fleet.finish_creation(name)
            self.sync_sandboxes(sandboxes)
            if sandbox is not None and sandbox.ready and self._fleet.is_unlimited:
                # A process that is up already: it holds none of the functions, so nothing is read.
                self._fleet.adopt(sandbox.id, ())
                self.record_sandbox_ready()
            self._context.on_change()

    def _delete(self, action: Delete) -> None:
        if action.reason is ActionReason.START_TIMED_OUT:
            logger.warning("sandbox %s was not ready in time", action.sandbox)
            self.failures.record_failure(
                LifecycleStep.START, f"sandbox {action.sandbox} was not ready in time"
            )
            self._count_failure("start", was_ready=False)
        self._fleet.mark_draining(action.sandbox)
        at_once = action.reason is ActionReason.MEMORY
        failed = action.reason in (ActionReason.FAILED, ActionReason.START_TIMED_OUT)
        self._tasks.start(
            self._context.platform.delete(action.sandbox, at_once=at_once, failed=failed)
        )

    def _attach(self, sandbox: str, function: str) -> None:
        """Attach a function, with those that are attached to the sandbox at the same time."""
        self._n_attaching += 1
        if sandbox in self._attach_queues:
            self._attach_queues[sandbox].append(function)
            return
        self._attach_queues[sandbox] = deque([function])
        self._tasks.start(self._attach_queued(sandbox))

    async def _attach_queued(self, sandbox: str) -> None:
        """Attach what is queued for a sandbox, which loads one function at a time."""
        queue, is_done = self._attach_queues[sandbox], False
        try:
            while queue:
                is_replaced = self._was_lost(queue[0])
                n_functions = min(
                    len(queue), MAX_REPLACED_ATTACHES if is_replaced else MAX_ATTACHES
                )
                await self._attach_some(sandbox, [queue.popleft() for _ in range(n_functions)])
                if is_replaced and queue:
                    await asyncio.sleep(REPLACED_PAUSE_S)
            is_done = True
        finally:
            del self._attach_queues[sandbox]
            self._n_attaching -= len(queue)
            if not is_done:  # its functions would be on their way for ever
                self.mark_sandbox_failed(sandbox, cause="attach", message="attach was cancelled")

    def _was_lost(self, function: str) -> bool:
        """Return whether a function has just lost a sandbox, so that routers compute it."""
        lost_at = self._lost_at.get(function, -math.inf)
        if self._context.clock() - lost_at <= LOST_S:
            return True
        self._lost_at.pop(function, None)
        return False

    async def _attach_some(self, sandbox: str, functions: Sequence[str]) -> None:
        record, started = self._fleet.get(sandbox), self._context.clock()
        try:
            if record is None or record.state is not SandboxState.READY:
                return  # it has failed meanwhile, or is being deleted
            for function in functions:
                self._context.activation_trace.record_attach(function, started)
            errors = await self._call_attach(record.sandbox.address, functions)
            duration_s = self._context.clock() - started
            for function in functions:
                self._on_attach_ended(sandbox, function, errors.get(function), duration_s)
        finally:
            self._n_attaching -= len(functions)
            if self._n_attaching == 0:
                self._context.on_change()

    async def _call_attach(
        self, address: str, functions: Sequence[str]
    ) -> Mapping[str, SandboxClientError]:
        """Attach functions; return the errors of those that are not attached."""
        model = self._context.model
        specs = [model.functions[function].spec for function in functions]
        try:
            return await self._context.sandbox_client.attach_all(address, specs, store=model.store)
        except SandboxClientError as error:
            return dict.fromkeys(functions, error)

    def _on_attach_ended(
        self, sandbox: str, function: str, error: SandboxClientError | None, duration_s: float
    ) -> None:
        if error is None:
            self._on_attached(sandbox, function, duration_s=duration_s)
        elif error.code == CORRUPTED_CODE:
            self._on_corrupted(sandbox, function, message=str(error))
        elif error.code == OUT_OF_MEMORY_CODE:
            self._on_out_of_memory(sandbox, function, message=str(error))
        else:
            self.mark_sandbox_failed(sandbox, cause="attach", message=str(error))

    def _on_attached(self, sandbox: str, function: str, *, duration_s: float) -> None:
        self.corrupted.record_success(function)
        self._fleet.set_function_state(sandbox, function, AssignmentState.ATTACHED)
        self._create_backoff.reset()
        self.failures.record_success(LifecycleStep.SERVE)
        self._context.metrics.attach_seconds.observe(duration_s)
        self._context.activation_trace.record_attached(function, duration_s)
        self._context.on_attached()

    def _on_corrupted(self, sandbox: str, function: str, *, message: str) -> None:
        """Back the function off; the sandbox stays in service if it holds other functions."""
        logger.error("function %s cannot be attached: %s", function, message)
        self.corrupted.record_failure(function, self._context.clock())
        self.failures.record_failure(LifecycleStep.SERVE, message)
        self._context.metrics.sandbox_failures.labels(CORRUPTED_CODE).inc()
        self._fleet.remove_function(sandbox, function)
        record = self._fleet.get(sandbox)
        if record is not None and not record.functions:
            self.mark_sandbox_failed(sandbox, cause=CORRUPTED_CODE, message=message)

    def _on_out_of_memory(self, sandbox: str, function: str, *, message: str) -> None:
        """Mark the sandbox as full: it stays in service and the function is placed elsewhere."""
        logger.warning("function %s was not attached: %s", function, message)
        self.failures.record_failure(LifecycleStep.SERVE, message)
        self._context.metrics.sandbox_failures.labels(OUT_OF_MEMORY_CODE).inc()
        self._fleet.remove_function(sandbox, function)
        self._fleet.mark_full(sandbox)

    async def _detach(
        self, sandbox: str, function: str, *, cancelled: asyncio.Event, drain_s: float
    ) -> None:
        if await self._drain((sandbox, function), cancelled, drain_s):
            return
        record = self._fleet.get(sandbox)
        if record is None:
            return
        try:
            await self._context.sandbox_client.detach(record.sandbox.address, function)
        except SandboxClientError as error:
            self.mark_sandbox_failed(sandbox, cause="detach", message=str(error))
        else:
            self._fleet.remove_function(sandbox, function)
            self._context.on_change()

    async def _drain(self, key: AssignmentKey, cancelled: asyncio.Event, drain_s: float) -> bool:
        """Wait until calls in flight have arrived; return whether the detach was cancelled."""
        try:
            async with asyncio.timeout(drain_s):
                await cancelled.wait()
        except TimeoutError:
            return cancelled.is_set()  # both may happen in the same iteration of the event loop
        finally:
            if self._pending_detaches.get(key) is cancelled:
                del self._pending_detaches[key]
        return True


class CorruptedFunctionBackoff:
    """Exponential back-off of functions whose weights sandboxes found corrupted."""

    def __init__(self) -> None:
        self._backoffs: dict[str, Backoff] = {}

    def record_failure(self, function: str, now: float) -> None:
        """Record that a sandbox found a function's weights corrupted."""
        if function not in self._backoffs:
            self._backoffs[function] = ExponentialBackoff(
                CORRUPTED_INITIAL_BACKOFF_S, CORRUPTED_MAX_BACKOFF_S
            )
        self._backoffs[function].record_failure(now)

    def record_success(self, function: str) -> None:
        """Record that a function was attached, which resets its back-off."""
        self._backoffs.pop(function, None)

    def is_backing_off(self, function: str, now: float) -> bool:
        """Return whether a function must not be attached now."""
        backoff = self._backoffs.get(function)
        return backoff is not None and backoff.is_blocked(now)


class LifecycleStep(Enum):
    """The steps that a function needs to become ready, in their order."""

    CREATE = "create"
    START = "start"
    SERVE = "serve"
    FIT = "fit"


class FailureTracker:
    """The last failure of each lifecycle step that has not succeeded since."""

    def __init__(self) -> None:
        self._failures: dict[LifecycleStep, str] = {}

    def record_failure(self, step: LifecycleStep, message: str) -> None:
        """Record that a step failed."""
        self._failures[step] = message

    def record_success(self, step: LifecycleStep) -> None:
        """Record that a step succeeded, which clears its failure."""
        self._failures.pop(step, None)

    def record_memory_pressure(
        self, activating: Collection[str], *, waiting: Collection[str], too_large: Collection[str]
    ) -> None:
        """Record whether functions that requests wait for lack memory.

        Args:
            activating: functions that requests wait for.
            waiting: functions that wait until others are idle and can be evicted.
            too_large: functions that fit in no sandbox.
        """
        n_waiting, n_too_large = (len({*activating} & {*names}) for names in (waiting, too_large))
        if n_waiting or n_too_large:
            counts = f"{n_waiting} functions wait for memory, {n_too_large} fit"
            self.record_failure(LifecycleStep.FIT, f"memory: {counts} in no sandbox")
        else:
            self.record_success(LifecycleStep.FIT)

    @property
    def message(self) -> str:
        """The failure of the earliest failed step; empty if no step failed."""
        return next((self._failures[step] for step in LifecycleStep if step in self._failures), "")
