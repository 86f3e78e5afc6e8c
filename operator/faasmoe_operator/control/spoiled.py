"""Functions whose block in the store is corrupted, and when to try them again. Pure."""

from __future__ import annotations

FIRST_S = 1.0
MOST_S = 60.0


class Spoiled:
    """What sandboxes refused to attach because its bytes are wrong."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}
        self._waits_s: dict[str, float] = {}

    def refused(self, function: str, now: float) -> None:
        """Note that a sandbox found a function's block corrupted."""
        wait_s = self._waits_s.get(function, FIRST_S)
        self._until[function] = now + wait_s
        self._waits_s[function] = min(2 * wait_s, MOST_S)

    def attached(self, function: str) -> None:
        """Note that a function was attached: it is well again."""
        self._until.pop(function, None)
        self._waits_s.pop(function, None)

    def is_waiting(self, function: str, now: float) -> bool:
        """Return whether a function is not to be attached yet."""
        return now < self._until.get(function, now)
