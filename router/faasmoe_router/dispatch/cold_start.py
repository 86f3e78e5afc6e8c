"""Cold starts: calls wait for functions that are being activated, and for replacement replicas.

A missing function gets one timeout, which starts with the first call that needs it and is shared
by all calls until it responds: an unavailable function must not cost a wait in every layer of every
token. After the timeout its calls are computed locally immediately, while its activation is still
requested every second. Knows routing and health; the caller makes the calls.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from faasmoe_contracts.routing_table import FunctionEndpoints
from faasmoe_router.dispatch.endpoint_health import EndpointHealth
from faasmoe_router.dispatch.load import LoadMeter
from faasmoe_router.dispatch.metrics import DispatchMetrics
from faasmoe_router.dispatch.routing import RoutingIndex
from faasmoe_router.dispatch.transport import CallError, EndpointStarting

REQUEST_INTERVAL_S = 1.0
LOST_S = 10.0  # for which a function that has lost its last address counts as being replaced
FORGET_AFTER_S = 30.0  # an absence that no call has met for this long starts anew

CallFailures = dict[int, CallError | None]
"""The error of each position without a result; None if its function has no usable address."""


@dataclass(frozen=True, slots=True)
class ActivationSettings:
    """How calls wait for functions that are being activated.

    Attributes:
        request_activation: requests functions, in the order in which they are needed; must not
            block.
        timeout_s: how long all calls together wait for a function before it is computed locally.
        retry_interval_s: delay between two attempts at an address that refuses connections.
        replacement_timeout_s: how long calls wait for another address after an ejection, or after
            their function has lost its last one. By default the router computes at once, until the
            control plane has replaced the sandbox: to map a function costs a millisecond.
    """

    request_activation: Callable[[Sequence[str]], None]
    timeout_s: float = 2.0
    retry_interval_s: float = 0.1
    replacement_timeout_s: float = 0.0


class ActivationWaiter:
    """Retries failed calls while their functions may still become available.

    Belongs to the engine's thread, except for `routing_changed`.

    Args:
        settings: how calls wait.
        health: which addresses were ejected, and when.
        load: receives the number of waiting calls.
        metrics: receives the same.

    Attributes:
        routing_changed: set by any thread after the routing has changed.
        absences: the functions that calls found missing.
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
        self._replaced = AbsenceTracker(0.0)  # functions that calls do not wait for
        self._lost_at_s: dict[str, float] = {}  # functions that have lost all of their addresses
        self._settings = settings
        self._health = health
        self._load = load
        self._metrics = metrics

    def record_routing(self, before: RoutingIndex, after: RoutingIndex, now_s: float) -> None:
        """Note which functions have lost all of their addresses with a new routing."""
        self.absences.retain(after.entries)
        self._replaced.retain(after.entries)
        self._lost_at_s = {
            name: lost_at_s
            for name, lost_at_s in self._lost_at_s.items()
            if now_s - lost_at_s < LOST_S and name in after.entries
        }
        for name, entry in before.entries.items():
            if entry.addresses and not set(entry.addresses) & set(_addresses(after, name)):
                self._lost_at_s[name] = now_s

    def was_lost(self, function_id: str, now_s: float) -> bool:
        """Return whether a function has lost all of its addresses shortly before.

        It may have others since. Not yet while calls wait for these.
        """
        lost_for_s = now_s - self._lost_at_s.get(function_id, -math.inf)
        return self._settings.replacement_timeout_s <= lost_for_s < LOST_S

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
        """Wait for functions and retry their calls; return the positions without a result.

        Args:
            entries: the function of each position, with the addresses that were tried.
            failures: the positions without a result.
            n_rows: number of rows of the batch, which predicts what the next layers need.
            routing: returns the current routing.
            retry: calls the functions of some positions; returns those that failed again.
            deadline_s: the layer's deadline, on the monotonic clock.
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
        """Request these functions, and those that the next layers probably need."""
        needed = dict.fromkeys((*function_ids, *routing.missing_for(n_rows)))
        due = self.absences.record_missing(
            [name for name in needed if name in routing.entries], now_s
        )
        unavailable = [name for name in due if not routing.entries[name].addresses]
        if unavailable:
            self._settings.request_activation(unavailable)

    def request_replacements(
        self, routing: RoutingIndex, function_ids: Iterable[str], now_s: float
    ) -> None:
        """Request those of these functions that have no address, each once a second.

        For functions that this process computes meanwhile: no call has missed them.
        """
        entries = routing.entries
        missing = [name for name in function_ids if name in entries and not entries[name].addresses]
        if due := self._replaced.record_missing(missing, now_s):
            self._settings.request_activation(due)

    def _retry_delay_s(
        self,
        entry: FunctionEndpoints | None,
        tried: FunctionEndpoints,
        error: CallError | None,
        now_s: float,
    ) -> float | None:
        """Return how long a call may wait for its retry, None if it should not be retried."""
        remaining_s = self.absences.remaining_s(tried.spec.id, now_s)
        if entry is None or remaining_s <= 0:
            return None
        if not entry.addresses:
            if tried.addresses:
                self._lost_at_s.setdefault(tried.spec.id, now_s)
            lost_at_s = self._lost_at_s.get(tried.spec.id)
            if lost_at_s is None:
                return remaining_s
            wait_s = lost_at_s + self._settings.replacement_timeout_s - now_s
            return wait_s if wait_s > 0 else None
        if entry.addresses != tried.addresses:
            return 0.0
        if isinstance(error, EndpointStarting):
            return remaining_s
        return self._replacement_delay_s(entry, now_s)

    def _replacement_delay_s(self, entry: FunctionEndpoints, now_s: float) -> float | None:
        """Return how long to wait for a replacement of ejected addresses, None for not at all."""
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


def _addresses(routing: RoutingIndex, function_id: str) -> Sequence[str]:
    entry = routing.entries.get(function_id)
    return () if entry is None else entry.addresses


@dataclass(slots=True)
class _Absence:
    since_s: float
    last_missed_s: float
    requested_s: float = float("-inf")


class AbsenceTracker:
    """Tracks missing functions; pure, the caller passes the time.

    Args:
        timeout_s: how long all calls together may wait for a missing function.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._absences: dict[str, _Absence] = {}

    def record_missing(self, function_ids: Iterable[str], now_s: float) -> list[str]:
        """Record functions that calls need; return those to request now."""
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
        """Return how long calls may still wait for a function; negative after its timeout."""
        absence = self._absences.get(function_id)
        return self._timeout_s if absence is None else absence.since_s + self._timeout_s - now_s

    @property
    def is_any_missing(self) -> bool:
        """Whether there is an absence that no response has cleared."""
        return bool(self._absences)

    def record_found(self, function_id: str) -> None:
        """Clear a function's absence, as it has responded."""
        self._absences.pop(function_id, None)

    def retain(self, function_ids: Iterable[str]) -> None:
        """Forget all other functions."""
        known = set(function_ids)
        self._absences = {f: a for f, a in self._absences.items() if f in known}
