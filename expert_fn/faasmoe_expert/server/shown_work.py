"""What a sandbox shows of the work that it did: sums of many tokens, late, with noise. Pure.

A sandbox computes the calls of few functions, often of one, so what it counts follows the gates'
choices, and these tell which tokens a text has (arXiv 2602.04105). Counts are shown as sums over
all routers and tenants, of at least `min_tokens` tokens, once these have passed. Two more things
would tell of single tokens: the moment at which a window fills, which is that of a call, so windows
end at the first scrape of a period only; and differences of exact sums, so each count has Laplace
noise as large as what one token adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from random import SystemRandom
from typing import Self

BUCKETS_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Upper bounds of compute times; one more bucket has no bound."""
PERIOD_S = 10.0
"""A window ends at most once in each period of the clock, below usual scrape intervals."""
COUNTS_PER_ROW = 4
"""Changes of all counts by a row: its frame or itself, the frame's transport, two of the times."""


@dataclass(frozen=True, slots=True)
class Work:
    """Counts since the sandbox started; fractions occur in none.

    Attributes:
        python_frames: frames computed by Python.
        shared_frames: those of them that came in shared memory.
        mailbox_frames: frames computed from mailboxes.
        more_rows: rows of hidden states beyond the first of each frame.
        computations: computations by time, one count for each of `BUCKETS_S` and one more.
        compute_s: time of all computations.
    """

    python_frames: int = 0
    shared_frames: int = 0
    mailbox_frames: int = 0
    more_rows: int = 0
    computations: tuple[int, ...] = (0,) * (len(BUCKETS_S) + 1)
    compute_s: float = 0.0

    @property
    def frames(self) -> int:
        """Frames computed."""
        return self.python_frames + self.mailbox_frames

    @property
    def rows(self) -> int:
        """Rows of hidden states computed."""
        return self.frames + self.more_rows

    def __add__(self, other: Self) -> Work:
        return self._combine(other, 1)

    def __sub__(self, other: Self) -> Work:
        return self._combine(other, -1)

    def with_noise(self, draw: Callable[[], float]) -> Work:
        """Return these counts with a draw added to each that is not 0, at least 0.

        The mean time of a computation stays.
        """

        def add_noise(count: int) -> int:
            return max(0, count + round(draw())) if count else 0

        noisy = {field.name: add_noise(getattr(self, field.name)) for field in fields(self)[:4]}
        computations = tuple(map(add_noise, self.computations))
        mean_s = self.compute_s / max(1, sum(self.computations))
        return Work(**noisy, computations=computations, compute_s=mean_s * sum(computations))

    def _combine(self, other: Work, sign: int) -> Work:
        pairs = zip(self.computations, other.computations, strict=True)
        return Work(
            self.python_frames + sign * other.python_frames,
            self.shared_frames + sign * other.shared_frames,
            self.mailbox_frames + sign * other.mailbox_frames,
            self.more_rows + sign * other.more_rows,
            tuple(a + sign * b for a, b in pairs),
            self.compute_s + sign * other.compute_s,
        )


def draw_laplace(scale: float) -> float:
    """Draw from the Laplace distribution around 0 with this scale, by the system's randomness."""
    random = SystemRandom()
    return random.expovariate(1 / scale) - random.expovariate(1 / scale)


class WorkWindow:
    """Shows work once a window of tokens is full.

    Args:
        min_tokens: tokens that a window has at least; 1 shows everything at once and exactly.
        draw_noise: draws the noise of a scale.

    Attributes:
        shown: what is shown.
    """

    def __init__(
        self, min_tokens: int, *, draw_noise: Callable[[float], float] = draw_laplace
    ) -> None:
        self.shown = Work()
        self._min_tokens = min_tokens
        self._draw_noise = draw_noise
        self._until_window = Work()
        self._layers_now = self._layers_most = 0
        self._period: int | None = None

    def set_layers(self, n_layers: int) -> None:
        """Say how many layers the attached functions have together: a token's rows at most."""
        self._layers_now = n_layers
        self._layers_most = max(self._layers_most, n_layers)

    def end(self, done: Work, now_s: float) -> bool:
        """End the window if it is full and may end now; return whether anything new is shown.

        Args:
            done: the work until now.
            now_s: the clock, seconds.
        """
        if self._min_tokens == 1:
            self.shown = done
            return True
        period = math.floor(now_s / PERIOD_S)
        if period == self._period:
            return False
        self._period = period
        new, rows_per_token = done - self._until_window, max(1, self._layers_most)
        if new.rows < rows_per_token * self._min_tokens:
            return False
        scale = COUNTS_PER_ROW * rows_per_token
        self.shown += new.with_noise(lambda: self._draw_noise(scale))
        self._until_window, self._layers_most = done, self._layers_now
        return True
