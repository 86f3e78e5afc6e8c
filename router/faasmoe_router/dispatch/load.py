"""Concurrency meter: how much each function is called.

Calls over mailboxes are counted natively and added when the load is read. The engine's thread
writes and any thread reads, without a lock: a function's counters are one tuple that is replaced as
a whole. All totals are monotonic; the load of an interval is the difference of two snapshots.
Counters are kept by function only, never by request or tenant.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple


class LoadTotals(NamedTuple):
    """A function's totals up to one moment.

    Attributes:
        in_flight_s: integral of the number of calls in flight over time, in call-seconds.
        calls: calls started.
        rows: rows that these calls carried.
    """

    in_flight_s: float = 0.0
    calls: int = 0
    rows: int = 0

    def plus(self, other: LoadTotals) -> LoadTotals:
        """Return the sum of both."""
        return LoadTotals(
            self.in_flight_s + other.in_flight_s, self.calls + other.calls, self.rows + other.rows
        )


class _Counters(NamedTuple):
    offset_s: float  # the integral at time t is offset_s + n_in_flight * t
    n_in_flight: int
    calls: int
    rows: int


_EMPTY = _Counters(0.0, 0, 0, 0)


NativeTotals = Callable[[float], Mapping[str, LoadTotals]]
"""Returns the totals of functions up to a time, of calls that bypass the meter."""


class LoadMeter:
    """Calls in flight by function; times are seconds of one monotonic clock.

    Attributes:
        queued: calls waiting now for the activation of their function.
        local_calls: total calls computed by local fallback.
        forward_passes: total forward passes started.
    """

    def __init__(self) -> None:
        self.queued = 0
        self.local_calls = 0
        self.forward_passes = 0
        self._counters: dict[str, _Counters] = {}
        self._native_totals: NativeTotals = lambda _: {}

    def include_native(self, totals: NativeTotals) -> None:
        """Add the totals of calls that bypass the meter from now on."""
        self._native_totals = totals

    def record_start(self, function_id: str, now_s: float, *, rows: int) -> None:
        """Record the start of a call."""
        offset_s, n_in_flight, calls, total_rows = self._counters.get(function_id, _EMPTY)
        self._counters[function_id] = _Counters(
            offset_s - now_s, n_in_flight + 1, calls + 1, total_rows + rows
        )

    def record_queued(self, function_id: str, now_s: float) -> None:
        """Record a request that is queued for a function: in flight, but not yet a call."""
        offset_s, n_in_flight, calls, rows = self._counters.get(function_id, _EMPTY)
        self._counters[function_id] = _Counters(offset_s - now_s, n_in_flight + 1, calls, rows)

    def record_end(self, function_id: str, now_s: float) -> None:
        """Record the end of a call or of a queued request."""
        offset_s, n_in_flight, calls, rows = self._counters.get(function_id, _EMPTY)
        self._counters[function_id] = _Counters(offset_s + now_s, n_in_flight - 1, calls, rows)

    def snapshot(self, now_s: float) -> dict[str, LoadTotals]:
        """Return every function's totals up to `now_s`."""
        totals = {
            function_id: LoadTotals(counters.offset_s + counters.n_in_flight * now_s, *counters[2:])
            for function_id, counters in list(self._counters.items())
        }
        for function_id, native in self._native_totals(now_s).items():
            totals[function_id] = totals.get(function_id, LoadTotals()).plus(native)
        return totals

    def retain(self, known: Collection[str]) -> None:
        """Drop functions that are not in `known` and have no call in flight."""
        for function_id, counters in list(self._counters.items()):
            if function_id not in known and not counters.n_in_flight:
                self._counters.pop(function_id, None)
