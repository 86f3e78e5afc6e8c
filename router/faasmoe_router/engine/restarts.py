"""How often the engine may be started again before the process had better end."""

from collections import deque


class RestartBudget:
    """Allows `limit` restarts in any `window_s` seconds; the time is passed in."""

    def __init__(self, *, limit: int, window_s: float) -> None:
        self._limit = limit
        self._window_s = window_s
        self._taken_s: deque[float] = deque()

    def take(self, now_s: float) -> bool:
        """Use one restart; return whether it was allowed."""
        while self._taken_s and self._taken_s[0] <= now_s - self._window_s:
            self._taken_s.popleft()
        if len(self._taken_s) >= self._limit:
            return False
        self._taken_s.append(now_s)
        return True
