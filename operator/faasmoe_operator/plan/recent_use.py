"""How recently something was used, later than it was if it is used often. Pure.

Orders what may make room. Each use counts half as much after `HALF_LIFE_S`; the sum of all, which
falls between uses, is kept as the time at which a single use would count as much. That time does
not change until the next use, and of what was used once, or long ago, it is the last use: what is
used seldom is ordered by its last use, and what is used often stays longer.
"""

from __future__ import annotations

import math

HALF_LIFE_S = 30.0


class RecentUse:
    """The uses of one thing.

    Attributes:
        time: when a single use would have counted as much as all; minus infinity before the first.
    """

    def __init__(self) -> None:
        self.time = -math.inf

    def add(self, now: float) -> None:
        """Count a use; `now` does not fall."""
        earlier = 2.0 ** ((self.time - now) / HALF_LIFE_S)
        self.time = now + HALF_LIFE_S * math.log2(1.0 + earlier)
