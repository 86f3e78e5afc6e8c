"""Whether a sandbox's own list of functions agrees with what is written down of it. Pure.

What sandboxes themselves say of their use: the witness when a router cannot be heard. Pure.

Asks sandboxes what they hold: when they become ready, and again and again.

One that answers garbage or lies is given up at once; one that does not answer only after several
times, as a sandbox that computes a large frame answers late.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_operator.aio import TaskSet, gather_limited
from faasmoe_operator.control.executor import ActionExecutor
from faasmoe_operator.control.fleet import Fleet, SandboxRecord
from faasmoe_operator.control.model import ControlledModel
from faasmoe_operator.control.sandbox_client import (
    AttachedFunction,
    SandboxClient,
    SandboxClientError,
)
from faasmoe_operator.plan.fleet import SandboxState
from faasmoe_operator.platforms.base import Platform

logger = logging.getLogger(__name__)


def find_listing_fault(
    listed: Sequence[AttachedFunction], specs: Mapping[str, FunctionSpec], *, model_digest: str
) -> str | None:
    """Return what is wrong with the list by itself; None if nothing is.

    Args:
        held: what the sandbox says that it holds.
        specs: the functions of the model, by id; others may be left from an earlier plan.
        model_digest: digest of the store that they are of.
    """
    for name, count in Counter(function.spec.id for function in listed).items():
        if count > 1:
            return f"lists function {name} {count} times"
    for function in listed:
        spec = specs.get(function.spec.id)
        if spec is not None and (function.spec, function.model_digest) != (spec, model_digest):
            return f"holds other experts as function {spec.id} than were attached"
    return None


def find_assignment_drift(
    listed: Sequence[AttachedFunction], *, expected: Collection[str], possible: Collection[str]
) -> str | None:
    """Return how a sandbox's functions differ from those that it should hold; None if they agree.

    Args:
        held: what the sandbox says that it holds.
        expected: functions that were attached all the time.
        possible: functions that it may hold, as they come and go.
    """
    names = {function.spec.id for function in listed}
    if missing := sorted(set(expected) - names):
        return f"no longer holds {missing[0]} ({len(missing)} functions are missing)"
    if unexpected := sorted(names - set(possible)):
        return f"holds {unexpected[0]}, which was never attached ({len(unexpected)} such functions)"
    return None


ACTIVITY_WINDOW_S = 15.0  # three inspections


class FunctionActivity:
    """Which functions computed frames lately, by the sandboxes' own counts."""

    def __init__(self) -> None:
        self._frame_counts: dict[tuple[str, str], int] = {}
        self._active_at: dict[str, float] = {}

    def record_frame_counts(
        self, sandbox: str, counts: Iterable[tuple[str, int]], *, now: float
    ) -> None:
        """Take how many frames each function in a sandbox has computed so far."""
        for function, count in counts:
            key = (sandbox, function)
            if count > self._frame_counts.get(key, count):
                self._active_at[function] = now
            self._frame_counts[key] = count

    def recently_active(self, now: float) -> set[str]:
        """Return the functions that computed between two of the last inspections."""
        self._active_at = {
            name: at for name, at in self._active_at.items() if now - at <= ACTIVITY_WINDOW_S
        }
        return set(self._active_at)

    def retain_sandboxes(self, sandboxes: Iterable[str]) -> None:
        """Forget the sandboxes that are not among these."""
        known = set(sandboxes)
        self._frame_counts = {
            place: n for place, n in self._frame_counts.items() if place[0] in known
        }


MAX_CONSECUTIVE_TIMEOUTS = 3
PARALLEL_CALLS = 8
_UNRESPONSIVE_CODES = ("timeout", "unreachable")


class SandboxProber:
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
        executor: ActionExecutor,
        clock: Callable[[], float],
    ) -> None:
        self._digest = model.store.model_digest
        self._specs = model.specs
        self._client = client
        self._fleet = fleet
        self._executor = executor
        self._consecutive_timeouts: Counter[str] = Counter()
        self._being_read_back: set[str] = set()
        self._tasks = TaskSet()
        self._clock = clock
        self.activity = FunctionActivity()

    async def read_back_all(self, platform: Platform[Any]) -> None:
        """Read back every sandbox that may hold something: returns when all have told or are lost.

        One without an address has never been called.
        """
        changes = platform.watch()
        while any(
            m.state is SandboxState.STARTING and m.sandbox.address for m in self._fleet.sandboxes
        ):
            await anext(changes)
            self._executor.sync_sandboxes(await platform.list())
            await gather_limited(
                self._fleet.awaiting_read_back(), self._read_back, limit=PARALLEL_CALLS
            )

    def start_read_back(self) -> None:
        """Begin to read what those sandboxes hold that have become ready."""
        for member in self._fleet.awaiting_read_back():
            if member.sandbox.id not in self._being_read_back:
                self._being_read_back.add(member.sandbox.id)
                self._tasks.start(self._read_back(member))

    async def stop(self) -> None:
        """Stop reading."""
        await self._tasks.cancel_all()

    async def _read_back(self, member: SandboxRecord) -> None:
        """Read what a sandbox holds that says it is ready, and take it into service."""
        try:
            while member.state is SandboxState.STARTING and self._is_current(member):
                listed = await self._list_functions(member)
                if listed is not None:
                    self._fleet.adopt(member.sandbox.id, (f.spec.id for f in listed))
                    self._executor.record_sandbox_ready()
        finally:
            self._being_read_back.discard(member.sandbox.id)

    def _is_current(self, member: SandboxRecord) -> bool:
        return self._fleet.get(member.sandbox.id) is member

    async def probe_all(self) -> None:
        """Ask every sandbox that is in service."""
        ready = [m for m in self._fleet.sandboxes if m.state is SandboxState.READY]
        await gather_limited(ready, self._probe, limit=PARALLEL_CALLS)
        for gone in [name for name in self._consecutive_timeouts if self._fleet.get(name) is None]:
            del self._consecutive_timeouts[gone]
        self.activity.retain_sandboxes(member.sandbox.id for member in self._fleet.sandboxes)

    async def _probe(self, member: SandboxRecord) -> None:
        attached, known = member.attached, set(member.functions)
        listed = await self._list_functions(member)
        if listed is None or member.state is not SandboxState.READY:
            return
        self.activity.record_frame_counts(
            member.sandbox.id, ((f.spec.id, f.n_frames) for f in listed), now=self._clock()
        )
        drift = find_assignment_drift(
            listed, expected=attached & member.attached, possible=known | set(member.functions)
        )
        if drift is not None:
            self._executor.mark_sandbox_failed(
                member.sandbox.id, cause="assignment_drift", message=drift
            )

    async def _list_functions(self, member: SandboxRecord) -> Sequence[AttachedFunction] | None:
        """Return what a sandbox holds; None if it does not say, which may cost it its service."""
        name = member.sandbox.id
        try:
            listing = await self._client.list(member.sandbox.address)
        except SandboxClientError as error:
            self._on_probe_error(name, error)
            return None
        del self._consecutive_timeouts[name]
        listed = listing.functions
        self._fleet.set_memory_limit(name, listing.memory_limit_bytes, now=self._clock())
        if (
            fault := find_listing_fault(listed, self._specs, model_digest=self._digest)
        ) is not None:
            self._executor.mark_sandbox_failed(name, cause="assignment_drift", message=fault)
            return None
        return listed

    def _on_probe_error(self, name: str, error: SandboxClientError) -> None:
        if error.code not in _UNRESPONSIVE_CODES:
            self._executor.mark_sandbox_failed(name, cause="protocol_error", message=str(error))
            return
        self._consecutive_timeouts[name] += 1
        if self._consecutive_timeouts[name] >= MAX_CONSECUTIVE_TIMEOUTS:
            self._executor.mark_sandbox_failed(name, cause="unresponsive", message=str(error))
