"""Back-off: how long to wait before the next attempt, given the failures in a row.

Pure: callers pass the time and the random number, and do the waiting.
"""

from __future__ import annotations

from collections.abc import Sequence


class Backoff:
    """Delays that grow with the number of failures in a row.

    Callers that wait themselves use `next_delay_s`; callers that skip attempts until a time use
    `record_failure` and `is_blocked`.

    Args:
        delays_s: delay after the first, second, ... failure in a row; the last one repeats.
        jitter: part of a delay that is random, 0 to 1; spreads clients that failed together.
        reset_after_s: time after a failure from which on it no longer counts; None for never.
        coalesce: whether failures while attempts are blocked are ignored, because they are
            outcomes of attempts that started together.

    Attributes:
        n_failures: failures in a row.
        blocked_until: end of the current delay, on the clock of `record_failure`.
    """

    def __init__(
        self,
        delays_s: Sequence[float],
        *,
        jitter: float = 0.0,
        reset_after_s: float | None = None,
        coalesce: bool = False,
    ) -> None:
        self.n_failures = 0
        self.blocked_until = 0.0
        self._delays_s = tuple(delays_s)
        self._jitter = jitter
        self._reset_after_s = reset_after_s
        self._coalesce = coalesce
        self._last_failure_at = 0.0

    def next_delay_s(self, random: float = 1.0) -> float:
        """Count a failure and return the delay before the next attempt, in seconds.

        Args:
            random: a random number from 0 to 1; 1 gives the full delay.
        """
        delay_s = self._delays_s[min(self.n_failures, len(self._delays_s) - 1)]
        self.n_failures += 1
        return delay_s * (1.0 - self._jitter * (1.0 - random))

    def record_failure(self, now: float) -> None:
        """Count a failure and block attempts for the next delay."""
        if self._coalesce and self.is_blocked(now):
            return
        if self._reset_after_s is not None and now - self._last_failure_at > self._reset_after_s:
            self.n_failures = 0
        self._last_failure_at = now
        self.blocked_until = now + self.next_delay_s()

    def is_blocked(self, now: float) -> bool:
        """Return whether the next attempt has to wait."""
        return now < self.blocked_until

    def reset(self) -> None:
        """Forget all failures, after a success."""
        self.n_failures = 0
        self.blocked_until = 0.0


class ExponentialBackoff(Backoff):
    """Delays that multiply by `factor` from `initial_s` up to `max_s`.

    Args:
        initial_s: delay after the first failure, in seconds, more than 0.
        max_s: longest delay, in seconds.
        factor: ratio of one delay to the previous one, more than 1.
        jitter: part of a delay that is random, 0 to 1.
    """

    def __init__(
        self, initial_s: float, max_s: float, *, factor: float = 2.0, jitter: float = 0.0
    ) -> None:
        delays_s = [initial_s]
        while delays_s[-1] < max_s:
            delays_s.append(min(delays_s[-1] * factor, max_s))
        super().__init__(delays_s, jitter=jitter)
