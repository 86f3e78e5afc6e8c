"""Whether new sandboxes may be created, or creation is backed off as they keep failing. Pure.

Functions whose block in the store is corrupted, and when to try them again. Pure.

Why sandboxes cannot be had or used, in words, for as long as it is so. No I/O.

Carries planned actions out: create and delete on the platform, attach and detach in sandboxes.

Each action is written down in the fleet before anything is sent, so that the next plan sees it, and
again when it has ended. A sandbox that refuses, hangs or answers nonsense is given up.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from faasmoe_operator.aio import TaskSet
from faasmoe_operator.control.fleet import Fleet
from faasmoe_operator.control.metrics import ControlPlaneMetrics
from faasmoe_operator.control.model import ControlledModel
from faasmoe_operator.control.sandbox_client import SandboxClient, SandboxClientError
from faasmoe_operator.errors import PlatformError
from faasmoe_operator.plan.actions import Action, ActionReason, Attach, Create, Delete, Detach
from faasmoe_operator.plan.fleet import AssignmentState, SandboxState
from faasmoe_operator.platforms.base import Platform, Sandbox

logger = logging.getLogger(__name__)


CREATE_BACKOFF_DELAYS_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
CREATE_BACKOFF_RESET_S = 120.0


@dataclass(frozen=True, slots=True)
class CreateBackoff:
    """Failures in a row and what they cost; failures while it is backed off count as one.

    Attributes:
        n_failures: failures in a row.
        until: when creation goes on.
        last: when the last failure was.
    """

    n_failures: int = 0
    until: float = 0.0
    last_failure_at: float = 0.0

    def is_allowed(self, now: float) -> bool:
        """Return whether sandboxes may be created."""
        return now >= self.until

    def after_failure(self, now: float) -> CreateBackoff:
        """Return what a sandbox that never served makes of it."""
        if not self.is_allowed(now):
            return self
        n = 0 if now - self.last_failure_at > CREATE_BACKOFF_RESET_S else self.n_failures
        return CreateBackoff(
            n + 1, now + CREATE_BACKOFF_DELAYS_S[min(n, len(CREATE_BACKOFF_DELAYS_S) - 1)], now
        )

    def after_success(self) -> CreateBackoff:
        """Return what a sandbox that serves makes of it."""
        return replace(self, n_failures=0, until=0.0)


CORRUPTED_INITIAL_BACKOFF_S = 1.0
CORRUPTED_MAX_BACKOFF_S = 60.0


class CorruptedFunctionBackoff:
    """What sandboxes refused to attach because its bytes are wrong."""

    def __init__(self) -> None:
        self._blocked_until: dict[str, float] = {}
        self._next_delays_s: dict[str, float] = {}

    def record_failure(self, function: str, now: float) -> None:
        """Note that a sandbox found a function's block corrupted."""
        delay_s = self._next_delays_s.get(function, CORRUPTED_INITIAL_BACKOFF_S)
        self._blocked_until[function] = now + delay_s
        self._next_delays_s[function] = min(2 * delay_s, CORRUPTED_MAX_BACKOFF_S)

    def record_success(self, function: str) -> None:
        """Note that a function was attached: it is well again."""
        self._blocked_until.pop(function, None)
        self._next_delays_s.pop(function, None)

    def is_backing_off(self, function: str, now: float) -> bool:
        """Return whether a function is not to be attached yet."""
        return now < self._blocked_until.get(function, now)


class LifecycleStep(Enum):
    """What has to work for a function to serve, in this order."""

    CREATE = "create"
    START = "start"
    SERVE = "serve"
    FIT = "fit"


class FailureTracker:
    """The last failure of each step that has not worked since."""

    def __init__(self) -> None:
        self._failures: dict[LifecycleStep, str] = {}

    def record_failure(self, step: LifecycleStep, message: str) -> None:
        """Note that a step failed."""
        self._failures[step] = message

    def record_success(self, step: LifecycleStep) -> None:
        """Note that a step worked: what went wrong with it before is over."""
        self._failures.pop(step, None)

    def record_memory_pressure(
        self, activating: Collection[str], *, waiting: Collection[str], too_large: Collection[str]
    ) -> None:
        """Note whether callers wait for functions that there is no memory for.

        Args:
            awaited: functions that callers wait for.
            waiting: functions that wait for others to be idle.
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
        """The trouble that is to be told: that of the earliest step; empty if there is none."""
        return next((self._failures[step] for step in LifecycleStep if step in self._failures), "")


CORRUPTED_CODE = "corrupted"  # a sandbox's code for bytes of the store that are wrong
OUT_OF_MEMORY_CODE = "out_of_memory"  # its code for a function that it has no memory for

AssignmentKey = tuple[str, str]
"""A sandbox's and a function's id."""


@dataclass(frozen=True, slots=True)
class ExecutorContext:
    """What the actuator works with.

    Attributes:
        model: the model.
        platform: runs sandboxes.
        client: talks to sandboxes.
        metrics: where actions are counted.
        clock: the time.
        changed: called when something has ended, so that the next round is due.
        attached: called when a function serves, so that the table is to be published.
        drain_s: how long to wait between the change of the table and a detach; 0 if nobody follows.
    """

    model: ControlledModel
    platform: Platform[Any]
    sandbox_client: SandboxClient
    metrics: ControlPlaneMetrics
    clock: Callable[[], float]
    on_change: Callable[[], None]
    on_attached: Callable[[], None]
    drain_s: Callable[[], float]


class ActionExecutor:
    """Begins actions and follows them to their end."""

    def __init__(self, fleet: Fleet, context: ExecutorContext) -> None:
        self.failures = FailureTracker()
        """Why sandboxes cannot be had or used at this moment."""
        self.corrupted = CorruptedFunctionBackoff()
        """Functions that are corrupted in the store."""
        self._fleet = fleet
        self._context = context
        self._tasks = TaskSet()
        self._pending_detaches: dict[AssignmentKey, asyncio.Event] = {}
        self._n_attaching = 0
        self._create_backoff = CreateBackoff()

    def can_create(self, now: float) -> bool:
        """Return whether sandboxes may be created, or too many have just failed."""
        return self._create_backoff.is_allowed(now)

    def create_allowed_at(self, now: float) -> float:
        """Return when sandboxes may be created again; infinity if they may be now."""
        return math.inf if self.can_create(now) else self._create_backoff.until

    def execute(self, action: Action) -> None:
        """Write an action down and begin it."""
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
                self._tasks.start(self._attach(action.sandbox, action.function))
            case Detach():
                self._fleet.set_function_state(
                    action.sandbox, action.function, AssignmentState.DETACHING
                )
                cancelled = asyncio.Event()
                if action.reason is not ActionReason.MEMORY:  # its room is another's already
                    self._pending_detaches[action.sandbox, action.function] = cancelled
                self._tasks.start(
                    self._detach(action.sandbox, action.function, cancelled=cancelled)
                )

    def cancel_detaches(self, desired: Mapping[str, int]) -> None:
        """Let functions stay that are leaving but still there, if they are wanted again."""
        live = self._live_replicas() if self._pending_detaches else {}
        for key in list(self._pending_detaches):
            sandbox, function = key
            member = self._fleet.get(sandbox)
            is_ready = member is not None and member.state is SandboxState.READY
            if is_ready and live.get(function, 0) < desired.get(function, 0):
                self._pending_detaches.pop(key).set()
                self._fleet.set_function_state(sandbox, function, AssignmentState.ATTACHED)
                live[function] = live.get(function, 0) + 1

    def mark_sandbox_failed(self, sandbox_id: str, *, cause: str, message: str) -> None:
        """Take a sandbox out of service for good; the next plan deletes it."""
        member = self._fleet.get(sandbox_id)
        if member is None or member.state in (SandboxState.FAILED, SandboxState.DRAINING):
            return
        logger.warning("sandbox %s failed and will be deleted: %s", sandbox_id, message)
        self.failures.record_failure(LifecycleStep.SERVE, f"sandbox {sandbox_id} failed: {message}")
        self._fleet.mark_failed(sandbox_id)
        self._count_failure(cause, was_ready=member.was_ready and cause != "attach")
        self._context.on_change()

    def sync_sandboxes(self, sandboxes: Sequence[Sandbox]) -> None:
        """Take the sandboxes that the platform sees; those that are not among them are lost."""
        for member in self._fleet.sync(sandboxes, now=self._context.clock()):
            if member.state not in (SandboxState.DRAINING, SandboxState.FAILED):
                state = member.state.value
                logger.warning("sandbox %s was lost while %s", member.sandbox.id, state)
                self._count_failure("lost", was_ready=member.was_ready)
        self._context.on_change()

    def record_sandbox_ready(self) -> None:
        """Note that a sandbox has come into service."""
        self.failures.record_success(LifecycleStep.START)
        self._context.on_change()

    async def stop(self) -> None:
        """Stop following actions; what the sandboxes were told goes on."""
        await self._tasks.cancel_all()

    def _live_replicas(self) -> dict[str, int]:
        live: dict[str, int] = {}
        for member in self._fleet.sandboxes:
            if member.state is SandboxState.READY:
                for function, state in member.functions.items():
                    if state is not AssignmentState.DETACHING:
                        live[function] = live.get(function, 0) + 1
        return live

    def _count_failure(self, cause: str, *, was_ready: bool) -> None:
        self._context.metrics.sandbox_failures.labels(cause).inc()
        if not was_ready:  # creating more of them would fail the same way
            self._create_backoff = self._create_backoff.after_failure(self._context.clock())

    async def _create(self, name: str) -> None:
        try:
            await self._context.platform.create(self._context.model.template)
        except PlatformError as error:
            logger.warning("a sandbox could not be created: %s", error)
            self.failures.record_failure(LifecycleStep.CREATE, str(error))
            self._count_failure("create", was_ready=False)
        else:
            self.failures.record_success(LifecycleStep.CREATE)
        finally:
            sandboxes = await self._context.platform.list()
            self._fleet.finish_creation(name)
            self.sync_sandboxes(sandboxes)

    def _delete(self, action: Delete) -> None:
        if action.reason is ActionReason.START_TIMED_OUT:
            logger.warning("sandbox %s was not ready in time", action.sandbox)
            self.failures.record_failure(
                LifecycleStep.START, f"sandbox {action.sandbox} was not ready in time"
            )
            self._count_failure("start", was_ready=False)
        self._fleet.mark_draining(action.sandbox)
        self._tasks.start(self._context.platform.delete(action.sandbox))

    async def _attach(self, sandbox: str, function: str) -> None:
        member = self._fleet.get(sandbox)
        if member is None:
            return
        started, message, code = self._context.clock(), "attach was cancelled", ""
        self._n_attaching += 1
        try:
            spec, store = self._context.model.functions[function].spec, self._context.model.store
            await self._context.sandbox_client.attach(member.sandbox.address, spec, store=store)
            message = ""
        except SandboxClientError as error:
            message, code = str(error), error.code
        finally:
            self._n_attaching -= 1
            if code == CORRUPTED_CODE:
                self._on_corrupted(sandbox, function, message=message)
            elif code == OUT_OF_MEMORY_CODE:
                self._on_out_of_memory(sandbox, function, message=message)
            elif message:
                self.mark_sandbox_failed(sandbox, cause="attach", message=message)
            else:
                self.corrupted.record_success(function)
                self._fleet.set_function_state(sandbox, function, AssignmentState.ATTACHED)
                self._create_backoff = self._create_backoff.after_success()
                self.failures.record_success(LifecycleStep.SERVE)
                self._context.metrics.attach_seconds.observe(self._context.clock() - started)
                self._context.on_attached()
            if self._n_attaching == 0:
                self._context.on_change()

    def _on_corrupted(self, sandbox: str, function: str, *, message: str) -> None:
        """Go on after a corrupted block: elsewhere, but a sandbox that serves others stays."""
        logger.error("function %s cannot be attached: %s", function, message)
        self.corrupted.record_failure(function, self._context.clock())
        self.failures.record_failure(LifecycleStep.SERVE, message)
        self._context.metrics.sandbox_failures.labels(CORRUPTED_CODE).inc()
        self._fleet.remove_function(sandbox, function)
        member = self._fleet.get(sandbox)
        if member is not None and not member.functions:
            self.mark_sandbox_failed(sandbox, cause=CORRUPTED_CODE, message=message)

    def _on_out_of_memory(self, sandbox: str, function: str, *, message: str) -> None:
        """Go on after a sandbox had no memory: what it holds serves on, this goes elsewhere."""
        logger.warning("function %s is not attached: %s", function, message)
        self.failures.record_failure(LifecycleStep.SERVE, message)
        self._context.metrics.sandbox_failures.labels(OUT_OF_MEMORY_CODE).inc()
        self._fleet.remove_function(sandbox, function)
        self._fleet.mark_full(sandbox)

    async def _detach(self, sandbox: str, function: str, *, cancelled: asyncio.Event) -> None:
        if await self._is_detach_cancelled((sandbox, function), cancelled):
            return
        member = self._fleet.get(sandbox)
        if member is None:
            return
        try:
            await self._context.sandbox_client.detach(member.sandbox.address, function)
        except SandboxClientError as error:
            self.mark_sandbox_failed(sandbox, cause="detach", message=str(error))
        else:
            self._fleet.remove_function(sandbox, function)
            self._context.on_change()

    async def _is_detach_cancelled(self, key: AssignmentKey, cancelled: asyncio.Event) -> bool:
        """Wait until calls on their way have come; return whether the function is to stay."""
        try:
            async with asyncio.timeout(self._context.drain_s()):
                await cancelled.wait()
        except TimeoutError:
            return cancelled.is_set()  # it may have been both in the same turn of the loop
        finally:
            if self._pending_detaches.get(key) is cancelled:
                del self._pending_detaches[key]
        return True
