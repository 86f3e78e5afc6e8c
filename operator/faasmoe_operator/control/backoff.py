"""Whether new sandboxes may be created, or creation is backed off as they keep failing. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

DELAYS_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
FORGET_AFTER_S = 120.0


@dataclass(frozen=True, slots=True)
class Backoff:
    """Failures in a row and what they cost; failures while it is backed off count as one.

    Attributes:
        n_failures: failures in a row.
        until: when creation goes on.
        last: when the last failure was.
    """

    n_failures: int = 0
    until: float = 0.0
    last: float = 0.0

    def is_open(self, now: float) -> bool:
        """Return whether sandboxes may be created."""
        return now >= self.until

    def failed(self, now: float) -> Backoff:
        """Return what a sandbox that never served makes of it."""
        if not self.is_open(now):
            return self
        n = 0 if now - self.last > FORGET_AFTER_S else self.n_failures
        return Backoff(n + 1, now + DELAYS_S[min(n, len(DELAYS_S) - 1)], now)

    def succeeded(self) -> Backoff:
        """Return what a sandbox that serves makes of it."""
        return replace(self, n_failures=0, until=0.0)
