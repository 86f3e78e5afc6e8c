"""How many calls may be made that are more than one for each part. Pure.

Without a bound a machine that is slow as a whole would be made slower by its own hedges.
"""

from __future__ import annotations


class ExtraCalls:
    """Allows a share of the calls on top, and a few at once.

    Args:
        share: extra calls for each call, 0 to 1.
        burst: extra calls that may come together.
    """

    def __init__(self, *, share: float = 0.05, burst: float = 8.0) -> None:
        self._share = share
        self._burst = burst
        self._left = burst

    def earn(self, n_calls: int) -> None:
        """Count calls that are made anyway."""
        self._left = min(self._burst, self._left + n_calls * self._share)

    def spend(self) -> bool:
        """Use one extra call; return whether it is allowed."""
        if self._left < 1:
            return False
        self._left -= 1
        return True
