"""How long calls wait for a function that is being started. Pure: the time is passed in.

A function that is missed gets one allowance of time, from the first call that misses it on, shared
by all calls until it answers: one that cannot be had must not cost a wait in every layer of every
token. After that its calls are computed at once, and it is still asked for each second.

Calls that wait: for functions that are being started, and for replicas in a dead one's place.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from faasmoe_contracts.routing_table import FunctionEndpoints
from faasmoe_router.dispatch.calls import CallError, EndpointStarting
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.resilience import EndpointHealth
from faasmoe_router.dispatch.routing import RoutingIndex

REQUEST_INTERVAL_S = 1.0
FORGET_AFTER_S = 30.0  # an absence that nobody has met for so long is a new one


@dataclass(slots=True)
class _Absence:
    since_s: float
    last_missed_s: float
    requested_s: float = float("-inf")


class AbsenceTracker:
    """What is known of the functions that calls have missed."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._absences: dict[str, _Absence] = {}

    def record_missing(self, function_ids: Iterable[str], now_s: float) -> list[str]:
        """Take note of functions that calls need; return those to ask for now."""
        due = []
        for function_id in function_ids:
            absence = self._absences.get(function_id)
            if absence is None or now_s - absence.last_missed_s > FORGET_AFTER_S:
                absence = self._absences[function_id] = _Absence(now_s, now_s)
            absence.last_missed_s = now_s
            if now_s - absence.requested_s >= REQUEST_INTERVAL_S:
                absence.requested_s = now_s
                due.append(function_id)
        return due

    def remaining_s(self, function_id: str, now_s: float) -> float:
        """Return how long calls may still wait for a function that was missed."""
        absence = self._absences.get(function_id)
        return self._timeout_s if absence is None else absence.since_s + self._timeout_s - now_s

    def record_found(self, function_id: str) -> None:
        """Forget a function's absence: it has answered."""
        self._absences.pop(function_id, None)

    def retain(self, function_ids: Iterable[str]) -> None:
        """Forget the functions that are not among these."""
        known = set(function_ids)
        self._absences = {f: a for f, a in self._absences.items() if f in known}


CallFailures = dict[int, CallError | None]
"""Why each position got no part; None for want of an address."""


@dataclass(frozen=True, slots=True)
class ActivationSettings:
    """How calls wait for functions that are being started.

    Attributes:
        wake: asks for functions, in the order in which they are needed; must not block.
        timeout_s: how long calls wait for a function, all together, before it is computed here.
        probe_s: time between two tries of an address that does not accept connections.
        replacement_s: how long calls wait for another address in place of one that was ejected,
            from its ejection on: control sees a dead sandbox too, and a warm one takes its place.
    """

    request_activation: Callable[[Sequence[str]], None]
    timeout_s: float = 2.0
    retry_interval_s: float = 0.1
    replacement_timeout_s: float = 0.25


class ActivationWaiter:
    """Has calls wait. Belongs to the engine's thread, but for `moved`.

    Args:
        holding: how calls wait.
        book: which addresses were ejected, and when.
        load: where those that wait are counted.
        metrics: counts them too.

    Attributes:
        moved: set when functions have moved, from any thread.
        patience: how long calls wait yet.
    """

    def __init__(
        self,
        settings: ActivationSettings,
        *,
        health: EndpointHealth,
        load: LoadMeter,
        metrics: DispatchMetrics,
    ) -> None:
        self.routing_changed = threading.Event()
        self.absences = AbsenceTracker(settings.timeout_s)
        self._settings = settings
        self._health = health
        self._load = load
        self._metrics = metrics

    def wait(
        self,
        entries: Mapping[int, FunctionEndpoints],
        failures: CallFailures,
        *,
        n_rows: int,
        routing: Callable[[], RoutingIndex],
        retry: Callable[[Mapping[int, FunctionEndpoints]], CallFailures],
        deadline_s: float,
    ) -> Collection[int]:
        """Wait for functions that are being started; return the positions that got no part.

        Args:
            entries: of each position, the function's addresses as they were tried.
            failures: the positions that have no part.
            n_rows: of the batch, for what the next layers will need.
            routing: returns where the functions are now.
            try_again: calls the functions of these positions.
            by_s: when the layer's time is over.
        """
        unresolved: list[int] = []
        tried = {i: entries[i] for i in failures}
        while True:
            self.routing_changed.clear()
            current_routing, now_s = routing(), time.monotonic()
            self._request_activation(
                current_routing, [tried[i].spec.id for i in failures], n_rows, now_s
            )
            if now_s >= deadline_s:
                return [*unresolved, *failures]
            delays_s = {
                i: self._retry_delay_s(
                    current_routing.entries.get(tried[i].spec.id), tried[i], error, now_s
                )
                for i, error in failures.items()
            }
            unresolved += [i for i in failures if delays_s[i] is None]
            queued = {i: delay_s for i, delay_s in delays_s.items() if delay_s is not None}
            if not queued:
                return unresolved
            with self._count_queued(len(queued)):
                self.routing_changed.wait(min(*queued.values(), self._settings.retry_interval_s))
            current_entries = routing().entries
            retried = {i: current_entries.get(tried[i].spec.id, tried[i]) for i in queued}
            failures = retry(retried)
            tried |= retried

    def _request_activation(
        self, routing: RoutingIndex, function_ids: Iterable[str], n_rows: int, now_s: float
    ) -> None:
        """Ask for the missed functions, and for those that the next layers will miss."""
        needed = dict.fromkeys((*function_ids, *routing.missing_for(n_rows)))
        due = self.absences.record_missing(
            [name for name in needed if name in routing.entries], now_s
        )
        unavailable = [name for name in due if not routing.entries[name].addresses]
        if unavailable:
            self._settings.request_activation(unavailable)

    def _retry_delay_s(
        self,
        entry: FunctionEndpoints | None,
        tried: FunctionEndpoints,
        error: CallError | None,
        now_s: float,
    ) -> float | None:
        """Return how long a call may wait before it is tried again, None if it had better not."""
        remaining_s = self.absences.remaining_s(tried.spec.id, now_s)
        if entry is None or remaining_s <= 0:
            return None
        if not entry.addresses:
            return remaining_s
        if entry.addresses != tried.addresses:
            return 0.0
        if isinstance(error, EndpointStarting):
            return remaining_s
        return self._replacement_delay_s(entry, now_s)

    def _replacement_delay_s(self, entry: FunctionEndpoints, now_s: float) -> float | None:
        """Return how long to wait for another address in place of those that were ejected."""
        ejected_at_s = [
            s for a in entry.addresses if (s := self._health.ejected_at_s(a)) is not None
        ]
        remaining_s = max(ejected_at_s, default=0.0) + self._settings.replacement_timeout_s - now_s
        return remaining_s if remaining_s > 0 else None

    @contextmanager
    def _count_queued(self, n_calls: int) -> Iterator[None]:
        self._load.queued = n_calls
        self._metrics.queued.set(n_calls)
        try:
            yield
        finally:
            self._load.queued = 0
            self._metrics.queued.set(0)
