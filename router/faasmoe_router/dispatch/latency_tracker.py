"""Quantiles of the latencies of calls, by the size of their frames; knows no addresses."""

from __future__ import annotations

import math
from collections import deque

WINDOW_SIZE = 256  # samples kept of one size class
MIN_SAMPLES = 20  # samples of one size class before its quantile is known
SAMPLES_PER_REFRESH = 32  # samples after which the quantile is recomputed


class LatencyTracker:
    """Tracks a quantile of call latencies by size class, which is the bit length of the row count.

    Sizes are separate because a prompt's frame takes a hundred times as long as one token's. The
    quantile is recomputed only now and then, so a call costs the hot path one append.

    Args:
        quantile: the quantile to track, between 0 and 1.

    Attributes:
        version: changes whenever a quantile does.
    """

    def __init__(self, quantile: float = 0.95) -> None:
        self._quantile = quantile
        self._windows: dict[int, _LatencyWindow] = {}
        self.version = 0

    def record(self, n_rows: int, elapsed_s: float) -> None:
        """Record the time from a call's start to its complete response."""
        size_class = n_rows.bit_length()
        window = self._windows.get(size_class)
        if window is None:
            window = self._windows[size_class] = _LatencyWindow()
        window.times_s.append(elapsed_s)
        window.n_since_refresh += 1
        if window.n_since_refresh >= SAMPLES_PER_REFRESH or len(window.times_s) == MIN_SAMPLES:
            window.n_since_refresh = 0
            window.quantile_s = self._compute_quantile_s(window.times_s)
            self.version += 1

    def quantile_s(self, n_rows: int) -> float:
        """Return the quantile for calls of this size, infinity while there are too few samples."""
        window = self._windows.get(n_rows.bit_length())
        return math.inf if window is None else window.quantile_s

    def _compute_quantile_s(self, times_s: deque[float]) -> float:
        return sorted(times_s)[min(len(times_s) - 1, math.ceil(self._quantile * len(times_s)) - 1)]


class _LatencyWindow:
    """The most recent latencies of one size class."""

    __slots__ = ("n_since_refresh", "quantile_s", "times_s")

    def __init__(self) -> None:
        self.times_s: deque[float] = deque(maxlen=WINDOW_SIZE)
        self.n_since_refresh = 0
        self.quantile_s = math.inf
