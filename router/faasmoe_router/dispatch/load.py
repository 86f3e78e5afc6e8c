"""How much each function is called, measured where it happens and read from elsewhere.

One thread writes and any thread reads, without a lock: a function's figures are one tuple, which is
replaced as a whole. A reading grows for ever; two readings give the load between them. Counted by
function only, never by request or tenant.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple


class LoadTotals(NamedTuple):
    """A function's totals up to one moment.

    Attributes:
        in_flight_s: integral of the number of calls in flight, over time.
        calls: calls begun.
        rows: rows that they carried.
    """

    in_flight_s: float = 0.0
    calls: int = 0
    rows: int = 0


class _Counters(NamedTuple):
    offset_s: float  # the integral at time t is offset_s + open * t
    n_in_flight: int
    calls: int
    rows: int


_EMPTY = _Counters(0.0, 0, 0, 0)


class LoadMeter:
    """Calls in flight of each function; times are seconds of one monotonic clock.

    Attributes:
        held: calls that wait now for their function to be started.
        local: calls that were computed in the router instead; grows for ever.
        passes: passes through the model's layers that have begun; grows for ever.
    """

    def __init__(self) -> None:
        self.queued = 0
        self.local_calls = 0
        self.forward_passes = 0
        self._counters: dict[str, _Counters] = {}

    def record_start(self, function_id: str, now_s: float, *, rows: int) -> None:
        """Count a call that begins."""
        offset_s, n_open, calls, total = self._counters.get(function_id, _EMPTY)
        self._counters[function_id] = _Counters(
            offset_s - now_s, n_open + 1, calls + 1, total + rows
        )

    def record_queued(self, function_id: str, now_s: float) -> None:
        """Count a call as in flight that is held before it begins."""
        offset_s, n_open, calls, rows = self._counters.get(function_id, _EMPTY)
        self._counters[function_id] = _Counters(offset_s - now_s, n_open + 1, calls, rows)

    def record_end(self, function_id: str, now_s: float) -> None:
        """Count the end of a call or of a hold."""
        offset_s, n_open, calls, rows = self._counters.get(function_id, _EMPTY)
        self._counters[function_id] = _Counters(offset_s + now_s, n_open - 1, calls, rows)

    def snapshot(self, now_s: float) -> dict[str, LoadTotals]:
        """Return every function's totals up to now."""
        return {
            function_id: LoadTotals(counters.offset_s + counters.n_in_flight * now_s, *counters[2:])
            for function_id, counters in list(self._counters.items())
        }

    def retain(self, known: Collection[str]) -> None:
        """Drop the functions that are not known any more and have no call in flight."""
        for function_id, counters in list(self._counters.items()):
            if function_id not in known and not counters.n_in_flight:
                self._counters.pop(function_id, None)
