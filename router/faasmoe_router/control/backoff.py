"""How long to wait before a call is tried again. Pure."""

from __future__ import annotations


class Backoff:
    """Waits that double from `first_s` to `most_s` until `reset`."""

    def __init__(self, first_s: float, most_s: float) -> None:
        self._first_s = first_s
        self._most_s = most_s
        self._next_s = first_s

    def next_s(self, chance: float) -> float:
        """Return the next wait.

        Args:
            chance: a random number in 0..1; spreads the routers that lost one control process.
        """
        wait_s = self._next_s * (0.5 + chance / 2)
        self._next_s = min(self._next_s * 2, self._most_s)
        return wait_s

    def reset(self) -> None:
        """Begin again with the first wait."""
        self._next_s = self._first_s
