"""Sliding averages of a function's load: ring buffers of one-second buckets, as in Knative.

A new window averages only over the seconds since its first write, so that a burst from zero counts
in full. Seconds without a write count as 0, except those after the last write, which are left out.
After a whole window without a write it starts again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

# Knative truncates averages to 6 decimals, so that rounding errors never add a replica.
_PRECISION = 10**6


@dataclass(frozen=True, slots=True)
class LoadAverages:
    """Average calls in flight of one function, summed over all routers.

    Attributes:
        stable: average over the stable window.
        panic: average over the panic window.
    """

    stable: float
    panic: float


@dataclass(frozen=True, slots=True)
class NoData:
    """There was no report for a whole stable window, which differs from a load of 0."""


class SlidingWindow:
    """Average over the last `window_s` seconds, where values of the same second are summed."""

    def __init__(self, window_s: float) -> None:
        self._size = math.ceil(window_s)
        self._buckets = [0.0] * self._size
        self._first_second: int | None = None
        self._last_second = 0

    def record(self, now: float, value: float) -> None:
        """Add a value to the second of `now`; ignored if that second is older than the window."""
        second = math.floor(now)
        if self._first_second is None or second - self._last_second >= self._size:
            self._restart(second)
        elif second <= self._last_second - self._size:
            return
        self._advance(second)
        self._buckets[second % self._size] += value

    def is_empty(self, now: float) -> bool:
        """Return whether nothing was recorded for a whole window."""
        return self._first_second is None or math.floor(now) - self._last_second >= self._size

    def average(self, now: float) -> float:
        """Return the average at `now`; 0 if nothing was recorded for a whole window."""
        end = max(math.floor(now), self._last_second)
        n_unwritten = end - self._last_second
        if self._first_second is None or n_unwritten >= self._size:
            return 0.0
        seconds = range(end - self._size + 1, self._last_second + 1)
        total = math.fsum(self._buckets[second % self._size] for second in seconds)
        n_buckets = min(self._last_second - self._first_second + 1, self._size - n_unwritten)
        return math.floor(total / n_buckets * _PRECISION) / _PRECISION

    def resized(self, window_s: float) -> SlidingWindow:
        """Return a window of another length with this one's buckets."""
        other = SlidingWindow(window_s)
        if self._first_second is not None:
            begin = max(self._first_second, self._last_second - self._size + 1)
            for second in range(begin, self._last_second + 1):
                other.record(second, self._buckets[second % self._size])
        return other

    def _restart(self, second: int) -> None:
        self._buckets = [0.0] * self._size
        self._first_second = self._last_second = second

    def _advance(self, second: int) -> None:
        for skipped in range(self._last_second + 1, second + 1):
            self._buckets[skipped % self._size] = 0.0
        self._first_second = (
            second if self._first_second is None else min(self._first_second, second)
        )
        self._last_second = max(self._last_second, second)


class LoadWindows:
    """The stable and the panic window of one function."""

    def __init__(self, *, stable_s: float, panic_s: float) -> None:
        self._stable = SlidingWindow(stable_s)
        self._panic = SlidingWindow(panic_s)

    def record(self, now: float, concurrency: float) -> None:
        """Add calls in flight to the second of `now`."""
        self._stable.record(now, concurrency)
        self._panic.record(now, concurrency)

    def load(self, now: float) -> LoadAverages | NoData:
        """Return both averages, or NoData after a whole stable window without a record."""
        if self._stable.is_empty(now):
            return NoData()
        return LoadAverages(stable=self._stable.average(now), panic=self._panic.average(now))

    def resize(self, *, stable_s: float, panic_s: float) -> None:
        """Change the lengths of the windows and keep their contents."""
        self._stable = self._stable.resized(stable_s)
        self._panic = self._panic.resized(panic_s)
