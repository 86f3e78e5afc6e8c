"""How many threads of OpenMP compute a pass on a CPU: the fastest number, which trials find.

These threads meet at the end of each product and of each attention. Where the products are short,
with few rows and small matrices, meeting takes longer than a further thread saves, and takes cores
from sandboxes. What is fastest depends on model, rows and machine. vLLM itself leaves one core
to others whatever the model is.

A trial gives each number some runs of consecutive passes: functions that are colocated are chosen
by pairs of passes (dispatch/colocation.py), which would otherwise differ in their threads too.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

MAX_ROWS = 64
"""Passes of more rows have products that are long enough for all threads."""

RUN_PASSES = 4
"""Consecutive passes with one number of threads; the first of them does not count."""

N_RUNS = 3
"""Of each number of threads in a trial."""

MIN_PASSES_BETWEEN_TRIALS, MAX_PASSES_BETWEEN_TRIALS = 256, 4096
"""Doubled from trial to trial: at first, functions are still being activated and colocated."""

MIN_GAIN = 0.03
"""Fraction of the time by which another number of threads must be faster to replace the current."""


def thread_numbers(n_threads: int) -> tuple[int, ...]:
    """Return the numbers of threads to choose from, ascending: one, half and all.

    Args:
        n_threads: all threads.
    """
    return tuple(sorted({1, max(1, n_threads // 2), n_threads}))


@dataclass(slots=True)
class _SizeClass:
    """The passes of similarly many rows.

    Attributes:
        current: the number of threads outside trials.
        between: passes from the end of the last trial to the next one.
        n_passes: passes since the last trial ended, or in the trial that is under way.
        is_trial: whether a trial is under way.
        times_s: times of the trial's passes by number of threads.
    """

    current: int
    between: int = MIN_PASSES_BETWEEN_TRIALS // 2
    n_passes: int = 0
    is_trial: bool = True
    times_s: dict[int, list[float]] = field(default_factory=dict)


class ThreadChoice:
    """Chooses the number of threads of each pass.

    Args:
        n_threads: all threads.
    """

    def __init__(self, n_threads: int) -> None:
        self._n_threads = n_threads
        self._numbers = thread_numbers(n_threads)
        self._classes: dict[int, _SizeClass] = {}

    def choose(self, n_rows: int) -> int:
        """Return the number of threads of the next pass, of `n_rows` rows."""
        if n_rows >= MAX_ROWS or len(self._numbers) == 1:
            return self._n_threads
        size = n_rows.bit_length()
        if size not in self._classes:
            self._classes[size] = _SizeClass(self._nearest(size))
        passes = self._classes[size]
        if not passes.is_trial:
            return passes.current
        return self._numbers[passes.n_passes // RUN_PASSES % len(self._numbers)]

    def record(self, n_rows: int, elapsed_s: float) -> int | None:
        """Record how long the pass took whose number of threads was chosen last.

        Returns:
            The number of threads for passes of as many rows if it has changed; otherwise None.
        """
        passes = self._classes.get(n_rows.bit_length())
        if passes is None:
            return None
        before = passes.current
        if passes.is_trial and passes.n_passes % RUN_PASSES:
            passes.times_s.setdefault(self.choose(n_rows), []).append(elapsed_s)
        passes.n_passes += 1
        if passes.is_trial and passes.n_passes == RUN_PASSES * N_RUNS * len(self._numbers):
            self._end_trial(passes)
        elif not passes.is_trial and passes.n_passes == passes.between:
            passes.is_trial, passes.n_passes = True, 0
        return None if passes.current == before else passes.current

    def _end_trial(self, passes: _SizeClass) -> None:
        medians_s = {n: statistics.median(times) for n, times in passes.times_s.items()}
        fastest = min(medians_s, key=medians_s.__getitem__)
        if medians_s[fastest] < (1 - MIN_GAIN) * medians_s[passes.current]:
            passes.current = fastest
        passes.between = min(2 * passes.between, MAX_PASSES_BETWEEN_TRIALS)
        passes.is_trial, passes.n_passes, passes.times_s = False, 0, {}

    def _nearest(self, size: int) -> int:
        """Return what the nearest class of sizes has, at first all threads."""
        if not self._classes:
            return self._n_threads
        return self._classes[min(self._classes, key=lambda other: abs(other - size))].current
