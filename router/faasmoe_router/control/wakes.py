"""Which functions to ask for and when: one wake however many wait. Pure: the time is passed in."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

REPEAT_S = 1.0  # in case the control process was restarted and has forgotten


class WakeRegister:
    """Functions that are wanted, in the order in which they were, and those asked for lately."""

    def __init__(self, repeat_s: float = REPEAT_S) -> None:
        self._repeat_s = repeat_s
        self._wanted: dict[str, None] = {}
        self._asked_s: dict[str, float] = {}

    def want(self, function_ids: Iterable[str]) -> None:
        """Ask for functions, at once or, if they were asked for lately, when that has passed."""
        self._wanted.update(dict.fromkeys(function_ids))

    def take_due(self, now_s: float) -> list[str]:
        """Return the functions to ask for now; they count as asked for."""
        due = [name for name in self._wanted if self._due_s(name) <= now_s]
        for name in due:
            del self._wanted[name]
            self._asked_s[name] = now_s
        return due

    def next_s(self) -> float:
        """Return when the next function is due; infinity if none is wanted."""
        return min(map(self._due_s, self._wanted), default=math.inf)

    def keep(self, missing: Collection[str]) -> None:
        """Forget the functions that are not missing any more."""
        self._wanted = {name: None for name in self._wanted if name in missing}
        self._asked_s = {name: s for name, s in self._asked_s.items() if name in missing}

    def forget_asked(self) -> None:
        """Ask anew at the next wish: whoever was asked is not there any more."""
        self._asked_s.clear()

    def _due_s(self, name: str) -> float:
        asked_s = self._asked_s.get(name)
        return -math.inf if asked_s is None else asked_s + self._repeat_s
