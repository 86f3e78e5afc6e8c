"""How long calls wait for a function that is being started. Pure: the time is passed in.

A function that is missed gets one allowance of time, from the first call that misses it on, shared
by all calls until it answers: one that cannot be had must not cost a wait in every layer of every
token. After that its calls are computed at once, and it is still asked for each second.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

ASK_INTERVAL_S = 1.0
FORGET_AFTER_S = 30.0  # an absence that nobody has met for so long is a new one


@dataclass(slots=True)
class _Absence:
    since_s: float
    met_s: float
    asked_s: float = float("-inf")


class Patience:
    """What is known of the functions that calls have missed."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._absences: dict[str, _Absence] = {}

    def miss(self, function_ids: Iterable[str], now_s: float) -> list[str]:
        """Take note of functions that calls need; return those to ask for now."""
        due = []
        for function_id in function_ids:
            absence = self._absences.get(function_id)
            if absence is None or now_s - absence.met_s > FORGET_AFTER_S:
                absence = self._absences[function_id] = _Absence(now_s, now_s)
            absence.met_s = now_s
            if now_s - absence.asked_s >= ASK_INTERVAL_S:
                absence.asked_s = now_s
                due.append(function_id)
        return due

    def left_s(self, function_id: str, now_s: float) -> float:
        """Return how long calls may still wait for a function that was missed."""
        absence = self._absences.get(function_id)
        return self._timeout_s if absence is None else absence.since_s + self._timeout_s - now_s

    def found(self, function_id: str) -> None:
        """Forget a function's absence: it has answered."""
        self._absences.pop(function_id, None)

    def keep(self, function_ids: Iterable[str]) -> None:
        """Forget the functions that are not among these."""
        known = set(function_ids)
        self._absences = {f: a for f, a in self._absences.items() if f in known}
