"""When an idle engine frees the memory that it keeps for its next requests."""

from __future__ import annotations

from enum import Enum, auto


class IdleMemory(Enum):
    """Memory that is kept for the next requests."""

    CALLS = auto()
    CACHE = auto()


class IdleReleases:
    """Decides what is freed: each kind once after each period of work.

    Args:
        calls_idle_s: seconds without work after which the memory of calls is freed.
        cache_idle_s: the same for the KV cache, cached prefixes included.
    """

    def __init__(self, *, calls_idle_s: float, cache_idle_s: float) -> None:
        self._idle_s = {IdleMemory.CALLS: calls_idle_s, IdleMemory.CACHE: cache_idle_s}
        self._released_after_s = dict.fromkeys(IdleMemory, float("-inf"))

    def due(self, now_s: float, active_s: float) -> frozenset[IdleMemory]:
        """Return what is to be freed now, while there is no request.

        Args:
            now_s: the time.
            active_s: when something was computed last; minus infinity for never.
        """
        due = frozenset(
            kind
            for kind, idle_s in self._idle_s.items()
            if now_s - active_s > idle_s and self._released_after_s[kind] != active_s
        )
        self._released_after_s |= dict.fromkeys(due, active_s)
        return due
