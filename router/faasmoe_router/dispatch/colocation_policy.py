"""Which functions to colocate, and how many: paired trials by batch size, and a ranking by use.

Pure: the times of passes and the pairs of functions are arguments. A trial is two consecutive
forward passes, one that calls all functions and one that computes some in the router.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

MAX_COLOCATED_FUNCTIONS = 4
"""Of a layer, if not all of them are."""

MAX_MODEL_FUNCTIONS = 256
"""Of all layers, if all of them are colocated. Each costs objects, address space and page
tables, whether it is computed here or not."""

MAX_COLOCATED_ROWS = 64
"""Larger batches colocate nothing: products of many rows occupy all cores."""

MIN_TRIALS = 5
"""Trials of a choice before its result counts."""

MAX_KEPT_TRIALS = 9
PASSES_BETWEEN_TRIALS = 64
PASSES_BETWEEN_FIRST_TRIALS = 4
"""The same while a choice of another batch size is assumed. Prompts are few passes, so that they
would otherwise be trials for long."""

MIN_GAIN = 0.02
"""Fraction of the baseline's time by which a choice must beat the current one to replace it."""

DECAY = 0.99
PASSES_BETWEEN_RANKINGS = 64
MIN_LEAD = 1.25
"""Factor by which another function must exceed a hot one's pairs to take its place."""


class ColocationPolicy:
    """Decides how many of each layer's functions to colocate, by batch size.

    Args:
        n_functions: number of functions in the layer with the most.
        n_layers: number of layers.
    """

    def __init__(self, n_functions: int, n_layers: int) -> None:
        self.choices = colocation_choices(n_functions, n_layers)
        self._trials: dict[int, PairedTrials] = {}

    def n_colocated(self, n_rows: int) -> int:
        """Return how many of each layer's functions to colocate in a pass of `n_rows` rows."""
        return self.choices[self._trials_for(n_rows).choice] if n_rows <= MAX_COLOCATED_ROWS else 0

    def record_pass(self, n_rows: int, elapsed_s: float) -> None:
        """Record the total time of such a pass's layers."""
        if n_rows <= MAX_COLOCATED_ROWS:
            self._trials_for(n_rows).record_pass(elapsed_s)

    def _trials_for(self, n_rows: int) -> PairedTrials:
        size = n_rows.bit_length()
        trials = self._trials.get(size)
        if trials is None:
            trials = self._trials[size] = PairedTrials(len(self.choices))
        if not trials.is_decided:
            decided = [other for other, known in self._trials.items() if known.is_decided]
            if decided:
                nearest = min(decided, key=lambda other: abs(other - size))
                trials.assume(self._trials[nearest].best)
        return trials


def colocation_choices(n_functions: int, n_layers: int) -> tuple[int, ...]:
    """Return how many of a layer's functions may be colocated, ascending from 0.

    Args:
        n_functions: number of functions in the layer with the most.
        n_layers: number of layers.
    """
    half = min(n_functions // 2, MAX_COLOCATED_FUNCTIONS)
    some = (0, *(n for n in (1, 2, 4) if n <= half))
    return (*some, n_functions) if 0 < n_functions * n_layers <= MAX_MODEL_FUNCTIONS else some


class PairedTrials:
    """Finds the fastest of several choices by trials that pair each with the first.

    A trial is two consecutive passes, the baseline's and the candidate's. Their ratio is robust
    against a machine that slows down over time, and the median of ratios against outliers.

    Args:
        n_choices: number of choices; the first is the baseline.

    Attributes:
        best: the fastest choice so far.
        is_decided: whether there were enough trials of every choice.
    """

    def __init__(self, n_choices: int) -> None:
        self.best = 0
        self.is_decided = n_choices < 2
        self._ratios = [deque[float](maxlen=MAX_KEPT_TRIALS) for _ in range(n_choices)]
        self._is_assumed = False
        self._n_passes = 0
        self._candidate = 0  # 0: no trial is running
        self._baseline_s: float | None = None  # of the running trial
        self._rotation = 0

    def assume(self, best: int) -> None:
        """Use this choice until the trials decide, which are rarer then."""
        if not self._is_assumed:
            self._is_assumed, self._candidate, self._baseline_s = True, 0, None
        self.best = best

    @property
    def choice(self) -> int:
        """The choice for the next pass; constant until `record_pass`."""
        if not self._candidate:
            return self.best
        return 0 if self._baseline_s is None else self._candidate

    def record_pass(self, elapsed_s: float) -> None:
        """Record the time of a pass that used `choice`."""
        if not self._candidate:
            self._n_passes += 1
            self._candidate = self._next_candidate()
        elif self._baseline_s is None:
            self._baseline_s = elapsed_s
        else:
            self._ratios[self._candidate].append(elapsed_s / self._baseline_s)
            self._candidate, self._baseline_s, self._n_passes = 0, None, 0
            self.is_decided = not self._undersampled()
            self.best = self._find_best()
            self._candidate = self._next_candidate()

    def _next_candidate(self) -> int:
        candidates = range(1, len(self._ratios))
        if not self.is_decided:
            if self._is_assumed and self._n_passes < PASSES_BETWEEN_FIRST_TRIALS:
                return 0
            return min(self._undersampled(), key=lambda i: len(self._ratios[i]))
        if not candidates or self._n_passes < PASSES_BETWEEN_TRIALS:
            return 0
        self._rotation = self._rotation % len(candidates) + 1
        return self._rotation

    def _undersampled(self) -> list[int]:
        return [i for i in range(1, len(self._ratios)) if len(self._ratios[i]) < MIN_TRIALS]

    def _find_best(self) -> int:
        if not self.is_decided:
            return self.best
        ratios = [1.0, *(self._median_ratio(i) for i in range(1, len(self._ratios)))]
        fastest = min(range(len(ratios)), key=ratios.__getitem__)
        return fastest if ratios[fastest] < ratios[self.best] - MIN_GAIN else self.best

    def _median_ratio(self, choice: int) -> float:
        ratios = self._ratios[choice]
        return statistics.median(ratios) if len(ratios) >= MIN_TRIALS else float("inf")


class FunctionRanking:
    """Ranks each layer's functions by their recent number of pairs, with hysteresis.

    Args:
        n_functions: number of functions of each layer.
        n_hot: number of functions of each layer that are hot.

    Attributes:
        version: increases whenever the functions are ranked anew.
    """

    def __init__(self, n_functions: Sequence[int], n_hot: int) -> None:
        self.version = 0
        self._n_hot = n_hot
        self._pairs: list[NDArray[np.float64]] = [np.zeros(n) for n in n_functions]
        self._ranked: list[tuple[int, ...]] = [tuple(range(n)) for n in n_functions]
        self._n_passes = 0

    def record_pairs(self, layer: int, function_index: int, n_pairs: int) -> None:
        """Count pairs of a layer's function."""
        self._pairs[layer][function_index] += n_pairs

    @property
    def ranks_next(self) -> bool:
        """Whether the next `finish_pass` ranks the functions."""
        return self._n_passes % PASSES_BETWEEN_RANKINGS == 0

    def finish_pass(self) -> bool:
        """Finish a pass; now and then rank the functions anew, decay the counts and return True."""
        is_due = self.ranks_next
        self._n_passes += 1
        if not is_due:
            return False
        for layer, pairs in enumerate(self._pairs):
            lead = np.ones(len(pairs))
            lead[list(self._ranked[layer][: self._n_hot])] = MIN_LEAD
            self._ranked[layer] = tuple(int(i) for i in np.argsort(-pairs * lead, kind="stable"))
            pairs *= DECAY**PASSES_BETWEEN_RANKINGS
        self.version += 1
        return True

    def hottest(self, layer: int, n: int, candidates: Collection[int]) -> tuple[int, ...]:
        """Return the positions of the at most `n` hottest of a layer's candidates."""
        return tuple(i for i in self._ranked[layer] if i in candidates)[:n]
