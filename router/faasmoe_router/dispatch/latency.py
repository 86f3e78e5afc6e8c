"""How long calls take: the quantile that hedging waits for. Pure.

Kept apart by size, because a prompt's frame takes a hundred times as long as one token's. Of each
size the last answers are kept, and the quantile is looked up anew every now and then: a call costs
the hot path one append.
"""

from __future__ import annotations

import math
from collections import deque

KEPT = 256  # answers of one size
LEAST = 20  # answers of one size before its quantile is known
FRESH = 32  # answers after which the quantile is looked up anew


class _Answers:
    """The last answers to calls of one size."""

    __slots__ = ("n_since", "quantile_s", "times_s")

    def __init__(self) -> None:
        self.times_s: deque[float] = deque(maxlen=KEPT)
        self.n_since = 0
        self.quantile_s = math.inf


class Latency:
    """The observed quantile of calls' times, by the rows that they carry.

    Args:
        quantile: which one, between 0 and 1.
    """

    def __init__(self, quantile: float = 0.95) -> None:
        self._quantile = quantile
        self._sizes: dict[int, _Answers] = {}

    def note(self, n_rows: int, took_s: float) -> None:
        """Take the time that one call took until its answer was whole."""
        size = n_rows.bit_length()
        answers = self._sizes.get(size)
        if answers is None:
            answers = self._sizes[size] = _Answers()
        answers.times_s.append(took_s)
        answers.n_since += 1
        if answers.n_since >= FRESH or len(answers.times_s) == LEAST:
            answers.n_since = 0
            answers.quantile_s = self._of(answers.times_s)

    def after_s(self, n_rows: int) -> float:
        """Return the quantile for calls of this size; infinity while too little is known."""
        answers = self._sizes.get(n_rows.bit_length())
        return math.inf if answers is None else answers.quantile_s

    def _of(self, times_s: deque[float]) -> float:
        return sorted(times_s)[min(len(times_s) - 1, math.ceil(self._quantile * len(times_s)) - 1)]
