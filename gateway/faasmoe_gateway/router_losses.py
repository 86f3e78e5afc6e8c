"""Which lost connections of a request are deaths of a router, and when it may be their cause; pure.

A router that dies resets connections, and those that are made while it does. None starts so soon
that these could be another's.
"""

from __future__ import annotations

import math

MAX_FRUITLESS_DEATHS = 2
ONE_DEATH_S = 0.1


class RouterLosses:
    """The routers that have died during one request; times are passed in."""

    def __init__(self) -> None:
        self._n_fruitless = 0
        self._n_frames = 0
        self._counted_s = -math.inf

    def count(self, n_frames: int, now_s: float) -> bool:
        """Count a lost connection; return whether it was another router's than the last one.

        Args:
            n_frames: events that the client has got.
            now_s: monotonic time.
        """
        is_fruitless = n_frames == self._n_frames
        if is_fruitless and now_s - self._counted_s < ONE_DEATH_S:
            return False
        self._n_fruitless = self._n_fruitless + 1 if is_fruitless else 1
        self._n_frames, self._counted_s = n_frames, now_s
        return True

    @property
    def is_suspect(self) -> bool:
        """Whether more routers died without anything new than can be coincidence."""
        return self._n_fruitless > MAX_FRUITLESS_DEATHS
