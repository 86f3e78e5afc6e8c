"""Carries planned actions out: create and delete on the platform, attach and detach in sandboxes.

Each action is written down in the fleet before anything is sent, so that the next plan sees it, and
again when it has ended. A sandbox that refuses, hangs or answers nonsense is given up.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from faasmoe_operator.control.backoff import Backoff
from faasmoe_operator.control.fleet import Fleet
from faasmoe_operator.control.metrics import ControlMetrics
from faasmoe_operator.control.model import ControlledModel
from faasmoe_operator.control.sandbox_client import SandboxClient, SandboxError
from faasmoe_operator.control.spoiled import Spoiled
from faasmoe_operator.control.tasks import Tasks
from faasmoe_operator.control.troubles import Step, Troubles
from faasmoe_operator.errors import PlatformError
from faasmoe_operator.plan.actions import Action, ActionReason, Attach, Create, Delete, Detach
from faasmoe_operator.plan.fleet import AssignmentState, SandboxState
from faasmoe_operator.platforms.base import Platform, Sandbox

logger = logging.getLogger(__name__)

CORRUPTED = "corrupted"  # a sandbox's code for bytes of the store that are wrong
OUT_OF_MEMORY = "out_of_memory"  # its code for a function that it has no memory for

Place = tuple[str, str]
"""A sandbox's and a function's id."""


@dataclass(frozen=True, slots=True)
class Surroundings:
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
    client: SandboxClient
    metrics: ControlMetrics
    clock: Callable[[], float]
    changed: Callable[[], None]
    attached: Callable[[], None]
    drain_s: Callable[[], float]


class Actuator:
    """Begins actions and follows them to their end."""

    def __init__(self, fleet: Fleet, surroundings: Surroundings) -> None:
        self.troubles = Troubles()
        """Why sandboxes cannot be had or used at this moment."""
        self.spoiled = Spoiled()
        """Functions that are corrupted in the store."""
        self._fleet = fleet
        self._with = surroundings
        self._tasks = Tasks()
        self._leaving: dict[Place, asyncio.Event] = {}
        self._n_attaching = 0
        self._backoff = Backoff()

    def may_create(self, now: float) -> bool:
        """Return whether sandboxes may be created, or too many have just failed."""
        return self._backoff.is_open(now)

    def may_create_at(self, now: float) -> float:
        """Return when sandboxes may be created again; infinity if they may be now."""
        return math.inf if self.may_create(now) else self._backoff.until

    def begin(self, action: Action) -> None:
        """Write an action down and begin it."""
        self._with.metrics.actions.labels(type(action).__name__.lower(), action.reason).inc()
        match action:
            case Create():
                for _ in range(action.count):
                    name = self._fleet.begin_create(now=self._with.clock())
                    self._tasks.begin(self._create(name))
            case Delete():
                self._delete(action)
            case Attach():
                self._fleet.put(action.sandbox, action.function, AssignmentState.ATTACHING)
                self._tasks.begin(self._attach(action.sandbox, action.function))
            case Detach():
                self._fleet.put(action.sandbox, action.function, AssignmentState.DETACHING)
                kept = asyncio.Event()
                if action.reason is not ActionReason.MEMORY:  # its room is another's already
                    self._leaving[action.sandbox, action.function] = kept
                self._tasks.begin(self._detach(action.sandbox, action.function, kept=kept))

    def keep_leaving(self, wanted: Mapping[str, int]) -> None:
        """Let functions stay that are leaving but still there, if they are wanted again."""
        live = self._live() if self._leaving else {}
        for place in list(self._leaving):
            sandbox, function = place
            member = self._fleet.get(sandbox)
            is_ready = member is not None and member.state is SandboxState.READY
            if is_ready and live.get(function, 0) < wanted.get(function, 0):
                self._leaving.pop(place).set()
                self._fleet.put(sandbox, function, AssignmentState.ATTACHED)
                live[function] = live.get(function, 0) + 1

    def give_up(self, sandbox_id: str, *, cause: str, why: str) -> None:
        """Take a sandbox out of service for good; the next plan deletes it."""
        member = self._fleet.get(sandbox_id)
        if member is None or member.state in (SandboxState.FAILED, SandboxState.DRAINING):
            return
        logger.warning("sandbox %s is given up: %s", sandbox_id, why)
        self.troubles.failed(Step.SERVE, f"sandbox {sandbox_id} was given up: {why}")
        self._fleet.fail(sandbox_id)
        self._count_failure(cause, has_served=member.served and cause != "attach")
        self._with.changed()

    def see(self, sandboxes: Sequence[Sandbox]) -> None:
        """Take the sandboxes that the platform sees; those that are not among them are lost."""
        for member in self._fleet.sync(sandboxes, now=self._with.clock()):
            if member.state not in (SandboxState.DRAINING, SandboxState.FAILED):
                state = member.state.value
                logger.warning("sandbox %s is gone, it was %s", member.sandbox.id, state)
                self._count_failure("lost", has_served=member.served)
        self._with.changed()

    def note_ready(self) -> None:
        """Note that a sandbox has come into service."""
        self.troubles.worked(Step.START)
        self._with.changed()

    async def end(self) -> None:
        """Stop following actions; what the sandboxes were told goes on."""
        await self._tasks.end()

    def _live(self) -> dict[str, int]:
        live: dict[str, int] = {}
        for member in self._fleet.members:
            if member.state is SandboxState.READY:
                for function, state in member.functions.items():
                    if state is not AssignmentState.DETACHING:
                        live[function] = live.get(function, 0) + 1
        return live

    def _count_failure(self, cause: str, *, has_served: bool) -> None:
        self._with.metrics.failures.labels(cause).inc()
        if not has_served:  # creating more of them would fail the same way
            self._backoff = self._backoff.failed(self._with.clock())

    async def _create(self, name: str) -> None:
        try:
            await self._with.platform.create(self._with.model.template)
        except PlatformError as error:
            logger.warning("a sandbox could not be created: %s", error)
            self.troubles.failed(Step.CREATE, str(error))
            self._count_failure("create", has_served=False)
        else:
            self.troubles.worked(Step.CREATE)
        finally:
            sandboxes = await self._with.platform.list()
            self._fleet.end_create(name)
            self.see(sandboxes)

    def _delete(self, action: Delete) -> None:
        if action.reason is ActionReason.START_TIMED_OUT:
            logger.warning("sandbox %s was not ready in time", action.sandbox)
            self.troubles.failed(Step.START, f"sandbox {action.sandbox} was not ready in time")
            self._count_failure("start", has_served=False)
        self._fleet.drain(action.sandbox)
        self._tasks.begin(self._with.platform.delete(action.sandbox))

    async def _attach(self, sandbox: str, function: str) -> None:
        member = self._fleet.get(sandbox)
        if member is None:
            return
        begun, why, code = self._with.clock(), "the attach was cut off", ""
        self._n_attaching += 1
        try:
            spec, store = self._with.model.functions[function].spec, self._with.model.store
            await self._with.client.attach(member.sandbox.address, spec, store=store)
            why = ""
        except SandboxError as error:
            why, code = str(error), error.code
        finally:
            self._n_attaching -= 1
            if code == CORRUPTED:
                self._spoil(sandbox, function, why=why)
            elif code == OUT_OF_MEMORY:
                self._fill(sandbox, function, why=why)
            elif why:
                self.give_up(sandbox, cause="attach", why=why)
            else:
                self.spoiled.attached(function)
                self._fleet.put(sandbox, function, AssignmentState.ATTACHED)
                self._backoff = self._backoff.succeeded()
                self.troubles.worked(Step.SERVE)
                self._with.metrics.attach.observe(self._with.clock() - begun)
                self._with.attached()
            if self._n_attaching == 0:
                self._with.changed()

    def _spoil(self, sandbox: str, function: str, *, why: str) -> None:
        """Go on after a corrupted block: elsewhere, but a sandbox that serves others stays."""
        logger.error("function %s cannot be attached: %s", function, why)
        self.spoiled.refused(function, self._with.clock())
        self.troubles.failed(Step.SERVE, why)
        self._with.metrics.failures.labels(CORRUPTED).inc()
        self._fleet.remove(sandbox, function)
        member = self._fleet.get(sandbox)
        if member is not None and not member.functions:
            self.give_up(sandbox, cause=CORRUPTED, why=why)

    def _fill(self, sandbox: str, function: str, *, why: str) -> None:
        """Go on after a sandbox had no memory: what it holds serves on, this goes elsewhere."""
        logger.warning("function %s is not attached: %s", function, why)
        self.troubles.failed(Step.SERVE, why)
        self._with.metrics.failures.labels(OUT_OF_MEMORY).inc()
        self._fleet.remove(sandbox, function)
        self._fleet.fill(sandbox)

    async def _detach(self, sandbox: str, function: str, *, kept: asyncio.Event) -> None:
        if await self._is_kept((sandbox, function), kept):
            return
        member = self._fleet.get(sandbox)
        if member is None:
            return
        try:
            await self._with.client.detach(member.sandbox.address, function)
        except SandboxError as error:
            self.give_up(sandbox, cause="detach", why=str(error))
        else:
            self._fleet.remove(sandbox, function)
            self._with.changed()

    async def _is_kept(self, place: Place, kept: asyncio.Event) -> bool:
        """Wait until calls on their way have come; return whether the function is to stay."""
        try:
            async with asyncio.timeout(self._with.drain_s()):
                await kept.wait()
        except TimeoutError:
            return kept.is_set()  # it may have been both in the same turn of the loop
        finally:
            if self._leaving.get(place) is kept:
                del self._leaving[place]
        return True
