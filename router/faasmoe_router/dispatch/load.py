"""How much each function is called, measured where it happens and read from elsewhere.

One thread writes and any thread reads, without a lock: a function's figures are one tuple, which is
replaced as a whole. A reading grows for ever; two readings give the load between them. Counted by
function only, never by request or tenant.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple


class Reading(NamedTuple):
    """A function's totals up to one moment.

    Attributes:
        in_flight_s: integral of the number of calls in flight, over time.
        calls: calls begun.
        rows: rows that they carried.
    """

    in_flight_s: float = 0.0
    calls: int = 0
    rows: int = 0


class _Figures(NamedTuple):
    offset_s: float  # the integral at time t is offset_s + open * t
    open: int
    calls: int
    rows: int


_NONE = _Figures(0.0, 0, 0, 0)


class LoadMeter:
    """Calls in flight of each function; times are seconds of one monotonic clock.

    Attributes:
        held: calls that wait now for their function to be started.
        local: calls that were computed in the router instead; grows for ever.
        passes: passes through the model's layers that have begun; grows for ever.
    """

    def __init__(self) -> None:
        self.held = 0
        self.local = 0
        self.passes = 0
        self._figures: dict[str, _Figures] = {}

    def begin(self, function_id: str, now_s: float, *, rows: int) -> None:
        """Count a call that begins."""
        offset_s, n_open, calls, total = self._figures.get(function_id, _NONE)
        self._figures[function_id] = _Figures(offset_s - now_s, n_open + 1, calls + 1, total + rows)

    def hold(self, function_id: str, now_s: float) -> None:
        """Count a call as in flight that is held before it begins."""
        offset_s, n_open, calls, rows = self._figures.get(function_id, _NONE)
        self._figures[function_id] = _Figures(offset_s - now_s, n_open + 1, calls, rows)

    def end(self, function_id: str, now_s: float) -> None:
        """Count the end of a call or of a hold."""
        offset_s, n_open, calls, rows = self._figures.get(function_id, _NONE)
        self._figures[function_id] = _Figures(offset_s + now_s, n_open - 1, calls, rows)

    def read(self, now_s: float) -> dict[str, Reading]:
        """Return every function's totals up to now."""
        return {
            function_id: Reading(figures.offset_s + figures.open * now_s, *figures[2:])
            for function_id, figures in list(self._figures.items())
        }

    def forget(self, known: Collection[str]) -> None:
        """Drop the functions that are not known any more and have no call in flight."""
        for function_id, figures in list(self._figures.items()):
            if function_id not in known and not figures.open:
                self._figures.pop(function_id, None)
