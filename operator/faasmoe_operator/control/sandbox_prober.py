"""Probes sandboxes: reads back their functions once they are ready, then checks them periodically.

A sandbox is marked as failed immediately if its response is invalid or differs from the recorded
assignments, but only after several consecutive timeouts, as a sandbox that computes a large frame
responds late. The probes also tell which functions are active, from the sandboxes' own counters, in
case a router stops reporting.

Where models share sandboxes, a model asks for the functions of its own store alone: the others'
are none of its concern.
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

PARALLEL_CALLS = 8
MAX_CONSECUTIVE_TIMEOUTS = 3
ACTIVITY_WINDOW_S = 15.0  # three probe intervals
_UNRESPONSIVE_CODES = ("timeout", "unreachable")

logger = logging.getLogger(__name__)


class SandboxProber:
    """Compares the functions that sandboxes list with the recorded assignments.

    Args:
        model: the model.
        client: calls sandboxes.
        fleet: the recorded assignments.
        executor: marks sandboxes as failed.
        clock: current time in seconds.

    Attributes:
        activity: which functions were active recently.
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
        self._listed_store = model.store.path if model.shares_sandboxes else None
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
        """Read back every starting sandbox; return when all have responded or are lost.

        Sandboxes without an address are left out: they cannot hold functions.
        """
        changes = platform.watch()
        while any(
            record.state is SandboxState.STARTING and record.sandbox.address
            for record in self._fleet.sandboxes
        ):
            await anext(changes)
            self._executor.sync_sandboxes(await platform.list())
            await gather_limited(
                self._fleet.awaiting_read_back(), self._read_back, limit=PARALLEL_CALLS
            )

    def start_read_back(self) -> None:
        """Start to read back the sandboxes that have become ready."""
        for record in self._fleet.awaiting_read_back():
            if record.sandbox.id not in self._being_read_back:
                self._being_read_back.add(record.sandbox.id)
                self._tasks.start(self._read_back(record))

    async def probe_all(self) -> None:
        """Probe every ready sandbox once."""
        ready = [r for r in self._fleet.sandboxes if r.state is SandboxState.READY]
        await gather_limited(ready, self._probe, limit=PARALLEL_CALLS)
        for name in [n for n in self._consecutive_timeouts if self._fleet.get(n) is None]:
            del self._consecutive_timeouts[name]
        self.activity.retain_sandboxes(record.sandbox.id for record in self._fleet.sandboxes)

    async def stop(self) -> None:
        """Cancel all read-backs."""
        await self._tasks.cancel_all()

    async def _read_back(self, record: SandboxRecord) -> None:
        """Read the functions of a ready sandbox, again until it responds, and take it into use."""
        name = record.sandbox.id
        try:
            while record.state is SandboxState.STARTING and self._fleet.get(name) is record:
                listed = await self._list_functions(record)
                if listed is not None:
                    self._fleet.adopt(name, (f.spec.id for f in listed))
                    self._executor.record_sandbox_ready()
        finally:
            self._being_read_back.discard(name)

    async def _probe(self, record: SandboxRecord) -> None:
        attached, assigned = record.attached, set(record.functions)
        listed = await self._list_functions(record)
        if listed is None or record.state is not SandboxState.READY:
            return
        self.activity.record_frame_counts(
            record.sandbox.id, ((f.spec.id, f.n_frames) for f in listed), now=self._clock()
        )
        drift = find_assignment_drift(
            listed, expected=attached & record.attached, possible=assigned | set(record.functions)
        )
        if drift is not None:
            self._executor.mark_sandbox_failed(
                record.sandbox.id, cause="assignment_drift", message=drift
            )

    async def _list_functions(self, record: SandboxRecord) -> Sequence[AttachedFunction] | None:
        """Return a sandbox's functions; None on an error, which may mark the sandbox as failed."""
        name = record.sandbox.id
        try:
            listing = await self._client.list(record.sandbox.address, store=self._listed_store)
        except SandboxClientError as error:
            self._on_probe_error(name, error)
            return None
        del self._consecutive_timeouts[name]
        self._fleet.set_memory_limit(name, listing.memory_limit_bytes, now=self._clock())
        fault = find_listing_fault(listing.functions, self._specs, model_digest=self._digest)
        if fault is not None:
            self._executor.mark_sandbox_failed(name, cause="assignment_drift", message=fault)
            return None
        return listing.functions

    def _on_probe_error(self, name: str, error: SandboxClientError) -> None:
        if error.code not in _UNRESPONSIVE_CODES:
            self._executor.mark_sandbox_failed(name, cause="protocol_error", message=str(error))
            return
        self._consecutive_timeouts[name] += 1
        if self._consecutive_timeouts[name] >= MAX_CONSECUTIVE_TIMEOUTS:
            self._executor.mark_sandbox_failed(name, cause="unresponsive", message=str(error))


class FunctionActivity:
    """Which functions computed frames recently, by the sandboxes' own counters."""

    def __init__(self) -> None:
        self._frame_counts: dict[tuple[str, str], int] = {}
        self._active_at: dict[str, float] = {}

    def record_frame_counts(
        self, sandbox: str, counts: Iterable[tuple[str, int]], *, now: float
    ) -> None:
        """Record the total number of frames that each function of a sandbox has computed."""
        for function, count in counts:
            key = (sandbox, function)
            if count > self._frame_counts.get(key, count):
                self._active_at[function] = now
            self._frame_counts[key] = count

    def recently_active(self, now: float) -> set[str]:
        """Return the functions that computed within the last `ACTIVITY_WINDOW_S` seconds."""
        self._active_at = {
            name: at for name, at in self._active_at.items() if now - at <= ACTIVITY_WINDOW_S
        }
        return set(self._active_at)

    def retain_sandboxes(self, sandboxes: Iterable[str]) -> None:
        """Remove the counters of all other sandboxes."""
        retained = set(sandboxes)
        self._frame_counts = {
            key: count for key, count in self._frame_counts.items() if key[0] in retained
        }


def find_listing_fault(
    listed: Sequence[AttachedFunction], specs: Mapping[str, FunctionSpec], *, model_digest: str
) -> str | None:
    """Return why a sandbox's list of functions is invalid, or None if it is valid.

    Args:
        listed: the functions that the sandbox lists.
        specs: the model's functions by id; unknown ids may be functions of an earlier plan.
        model_digest: digest of the store that the functions must be attached from.
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
    """Return how a sandbox's functions differ from the recorded ones, or None if they agree.

    Args:
        listed: the functions that the sandbox lists.
        expected: functions that were attached during the whole probe.
        possible: functions that were assigned at some time during the probe.
    """
    names = {function.spec.id for function in listed}
    if missing := sorted(set(expected) - names):
        return f"no longer holds {missing[0]} ({len(missing)} functions are missing)"
    if unexpected := sorted(names - set(possible)):
        return f"holds {unexpected[0]}, which was never attached ({len(unexpected)} such functions)"
    return None
