"""How many of a layer's functions the router computes itself, and which. Pure: times are told.

A call to a function costs both sides a turn on some core: about a millisecond of processor time
beside products that stream weights, by measurement. What the router computes itself saves that, and
takes a core away from what else it does. Which is more depends on cores, model and batch, so it is
measured where it happens: duels of two passes through
the layers, one with all functions called and one with some computed here, right after each other
(docs/performance.md, "hot blocks").

The router never becomes the whole model: at most half of a layer's functions are computed in it.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

MAX_ROWS = 64
"""Rows of a batch above which nothing is computed here: products of many rows take all cores."""

MAX_HERE = 4
DUELS = 5
"""Duels that are fought before anything is believed."""

KEPT_DUELS = 9
PASSES_BETWEEN_DUELS = 64
LEAST_GAIN = 0.02
"""What computing some here must save of the time of calling all, and of what is done now."""

DECAY = 0.99
PASSES_BETWEEN_RANKINGS = 64
LEAST_LEAD = 1.25
"""Times what a hot function has that another one must have to take its place."""


def choices_of(n_functions: int) -> tuple[int, ...]:
    """Return how many of a layer's functions may be computed here, none among them, ascending."""
    half = min(n_functions // 2, MAX_HERE)
    return (0, *(n for n in (1, 2, 4) if n <= half))


class Duels:
    """Which of some choices takes least time, by duels of each with the first.

    Args:
        n_choices: how many there are; the first is what the others are compared with.
    """

    def __init__(self, n_choices: int) -> None:
        self._ratios = [deque[float](maxlen=KEPT_DUELS) for _ in range(n_choices)]
        self._best = 0
        self._n_passes = 0
        self._challenger = 0  # none
        self._first_s: float | None = None  # the first's time in the duel that is being fought
        self._turn = 0

    @property
    def choice(self) -> int:
        """What the next pass is to do; the same until `add`."""
        if not self._challenger:
            return self._best
        return 0 if self._first_s is None else self._challenger

    def add(self, took_s: float) -> None:
        """Take the time of a pass that did `choice`."""
        if not self._challenger:
            self._n_passes += 1
            self._challenger = self._next_challenger()
        elif self._first_s is None:
            self._first_s = took_s
        else:
            self._ratios[self._challenger].append(took_s / self._first_s)
            self._challenger, self._first_s, self._n_passes = 0, None, 0
            self._best = self._find_best()
            self._challenger = self._next_challenger()

    def _next_challenger(self) -> int:
        others = range(1, len(self._ratios))
        young = [i for i in others if len(self._ratios[i]) < DUELS]
        if young:
            return min(young, key=lambda i: len(self._ratios[i]))
        if not others or self._n_passes < PASSES_BETWEEN_DUELS:
            return 0
        self._turn = self._turn % len(others) + 1
        return self._turn

    def _find_best(self) -> int:
        ratios = [1.0, *(self._ratio(i) for i in range(1, len(self._ratios)))]
        found = min(range(len(ratios)), key=ratios.__getitem__)
        return found if ratios[found] < ratios[self._best] - LEAST_GAIN else self._best

    def _ratio(self, choice: int) -> float:
        found = self._ratios[choice]
        return statistics.median(found) if len(found) >= DUELS else float("inf")


class Placement:
    """How many of each layer's functions are computed here, by the batch's size.

    Args:
        n_functions: functions of the layer that has most.
    """

    def __init__(self, n_functions: int) -> None:
        self.choices = choices_of(n_functions)
        self._duels: dict[int, Duels] = {}

    def here(self, n_rows: int) -> int:
        """Return how many of each layer's functions a pass of so many rows computes here."""
        return self.choices[self._of(n_rows).choice] if n_rows <= MAX_ROWS else 0

    def add(self, n_rows: int, took_s: float) -> None:
        """Take the time that the layers of such a pass took, all of them."""
        if n_rows <= MAX_ROWS:
            self._of(n_rows).add(took_s)

    def _of(self, n_rows: int) -> Duels:
        return self._duels.setdefault(n_rows.bit_length(), Duels(len(self.choices)))


class Popularity:
    """Which functions of each layer have most to compute, lately.

    Args:
        n_functions: of each layer.
        n_hot: how many of each layer's are hot.
    """

    def __init__(self, n_functions: Sequence[int], n_hot: int) -> None:
        self._n_hot = n_hot
        self._pairs: list[NDArray[np.float64]] = [np.zeros(n) for n in n_functions]
        self._ranked: list[tuple[int, ...]] = [tuple(range(n)) for n in n_functions]
        self._n_passes = 0

    def add(self, layer: int, function: int, n_pairs: int) -> None:
        """Count what a function of a layer, by its position, is asked for."""
        self._pairs[layer][function] += n_pairs

    def end_pass(self) -> bool:
        """Let what was counted fade; now and then rank anew, and tell so."""
        self._n_passes += 1
        if self._n_passes % PASSES_BETWEEN_RANKINGS != 1:
            return False
        for layer, pairs in enumerate(self._pairs):
            lead = np.ones(len(pairs))
            lead[list(self._ranked[layer][: self._n_hot])] = LEAST_LEAD
            self._ranked[layer] = tuple(int(i) for i in np.argsort(-pairs * lead, kind="stable"))
            pairs *= DECAY**PASSES_BETWEEN_RANKINGS
        return True

    def hottest(self, layer: int, n: int, among: Collection[int]) -> tuple[int, ...]:
        """Return the positions of a layer's functions that have most, of some, at most n."""
        return tuple(i for i in self._ranked[layer] if i in among)[:n]
