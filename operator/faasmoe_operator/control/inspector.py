"""Asks sandboxes what they hold: when they become ready, and again and again.

One that answers garbage or lies is given up at once; one that does not answer only after several
times, as a sandbox that computes a large frame answers late.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from faasmoe_operator.control.actuator import Actuator
from faasmoe_operator.control.fleet import Fleet, Member
from faasmoe_operator.control.inspection import fault_of_content, fault_of_list
from faasmoe_operator.control.model import ControlledModel
from faasmoe_operator.control.parallel import for_each
from faasmoe_operator.control.sandbox_client import AttachedFunction, SandboxClient, SandboxError
from faasmoe_operator.control.tasks import Tasks
from faasmoe_operator.control.usage import Usage
from faasmoe_operator.plan.fleet import SandboxState
from faasmoe_operator.platforms.base import Platform

logger = logging.getLogger(__name__)

MAX_SILENCES = 3
PARALLEL_CALLS = 8
_SILENT = ("timeout", "unreachable")


class Inspector:
    """Compares what sandboxes say with what is written down.

    Attributes:
        usage: what they say of their use.
    """

    def __init__(
        self,
        model: ControlledModel,
        client: SandboxClient,
        *,
        fleet: Fleet,
        actuator: Actuator,
        clock: Callable[[], float],
    ) -> None:
        self._digest = model.store.model_digest
        self._specs = model.specs
        self._client = client
        self._fleet = fleet
        self._actuator = actuator
        self._silences: Counter[str] = Counter()
        self._reading: set[str] = set()
        self._tasks = Tasks()
        self._clock = clock
        self.usage = Usage()

    async def read_back_all(self, platform: Platform[Any]) -> None:
        """Read back every sandbox that may hold something: returns when all have told or are lost.

        One without an address has never been called.
        """
        changes = platform.watch()
        while any(
            m.state is SandboxState.STARTING and m.sandbox.address for m in self._fleet.members
        ):
            await anext(changes)
            self._actuator.see(await platform.list())
            await for_each(self._fleet.unread(), self._read_back, limit=PARALLEL_CALLS)

    def begin_read_back(self) -> None:
        """Begin to read what those sandboxes hold that have become ready."""
        for member in self._fleet.unread():
            if member.sandbox.id not in self._reading:
                self._reading.add(member.sandbox.id)
                self._tasks.begin(self._read_back(member))

    async def end(self) -> None:
        """Stop reading."""
        await self._tasks.end()

    async def _read_back(self, member: Member) -> None:
        """Read what a sandbox holds that says it is ready, and take it into service."""
        try:
            while member.state is SandboxState.STARTING and self._is_there(member):
                held = await self._ask(member)
                if held is not None:
                    self._fleet.adopt(member.sandbox.id, (f.spec.id for f in held))
                    self._actuator.note_ready()
        finally:
            self._reading.discard(member.sandbox.id)

    def _is_there(self, member: Member) -> bool:
        return self._fleet.get(member.sandbox.id) is member

    async def inspect(self) -> None:
        """Ask every sandbox that is in service."""
        ready = [m for m in self._fleet.members if m.state is SandboxState.READY]
        await for_each(ready, self._inspect_one, limit=PARALLEL_CALLS)
        for gone in [name for name in self._silences if self._fleet.get(name) is None]:
            del self._silences[gone]
        self.usage.keep(member.sandbox.id for member in self._fleet.members)

    async def _inspect_one(self, member: Member) -> None:
        attached, known = member.attached, set(member.functions)
        held = await self._ask(member)
        if held is None or member.state is not SandboxState.READY:
            return
        self.usage.note(
            member.sandbox.id, ((f.spec.id, f.n_frames) for f in held), now=self._clock()
        )
        fault = fault_of_content(
            held, expected=attached & member.attached, possible=known | set(member.functions)
        )
        if fault is not None:
            self._actuator.give_up(member.sandbox.id, cause="lie", why=fault)

    async def _ask(self, member: Member) -> Sequence[AttachedFunction] | None:
        """Return what a sandbox holds; None if it does not say, which may cost it its service."""
        name = member.sandbox.id
        try:
            content = await self._client.list(member.sandbox.address)
        except SandboxError as error:
            self._failed(name, error)
            return None
        del self._silences[name]
        held = content.functions
        self._fleet.limit(name, content.memory_limit_bytes, now=self._clock())
        if (fault := fault_of_list(held, self._specs, model_digest=self._digest)) is not None:
            self._actuator.give_up(name, cause="lie", why=fault)
            return None
        return held

    def _failed(self, name: str, error: SandboxError) -> None:
        if error.code not in _SILENT:
            self._actuator.give_up(name, cause="garbage", why=str(error))
            return
        self._silences[name] += 1
        if self._silences[name] >= MAX_SILENCES:
            self._actuator.give_up(name, cause="silent", why=str(error))
