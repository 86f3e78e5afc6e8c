"""Which keys are to be worked on, and when; failing ones ever less often. Pure.

A key that fails waits for its back-off whatever is said of it meanwhile, since the very failing
causes events; only `urgent` news (its spec has changed) ends the wait.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

FIRST_DELAY_S = 1.0
MAX_DELAY_S = 300.0
FACTOR = 2.0


@dataclass(frozen=True, slots=True)
class _Entry:
    """What is known of a key.

    Attributes:
        due: when it is to be worked on; None if it is not.
        busy: whether it is being worked on.
        n_failures: failures in a row.
        not_before: end of its back-off.
        urgent: it was asked for urgently since work on it began.
    """

    due: float | None = None
    busy: bool = False
    n_failures: int = 0
    not_before: float = 0.0
    urgent: bool = False


class WorkQueue(Generic[Key]):
    """Keys to work on, each with the time when it is due."""

    def __init__(self) -> None:
        self._entries: dict[Key, _Entry] = {}

    def __len__(self) -> int:
        """Return how many keys wait or are worked on."""
        return sum(entry.busy or entry.due is not None for entry in self._entries.values())

    def add(self, key: Key, *, now: float, delay_s: float = 0.0, urgent: bool = False) -> None:
        """Ask for work on a key; of two times the earlier counts.

        Args:
            key: what to work on.
            now: the time.
            delay_s: not before this has passed.
            urgent: forget its failures.
        """
        entry = self._entries.get(key, _Entry())
        if urgent:
            entry = replace(entry, n_failures=0, not_before=0.0, due=None, urgent=True)
        due = max(now + delay_s, entry.not_before)
        earlier = due if entry.due is None else min(due, entry.due)
        self._entries[key] = replace(entry, due=earlier)

    def take(self, now: float) -> tuple[Key, float] | None:
        """Return a key that is due, and how long it has been; it is busy until `done`."""
        waiting = [
            (entry.due, key)
            for key, entry in self._entries.items()
            if not entry.busy and entry.due is not None and entry.due <= now
        ]
        if not waiting:
            return None
        due, key = min(waiting, key=lambda pair: pair[0])
        self._entries[key] = replace(self._entries[key], due=None, busy=True, urgent=False)
        return key, now - due

    def done(self, key: Key, *, now: float, again_s: float | None = None) -> None:
        """Say that work on a key went well.

        Args:
            key: the key.
            now: the time.
            again_s: work on it again after this, even if nothing happens.
        """
        entry = self._entries[key]
        self._entries[key] = replace(entry, busy=False, n_failures=0, not_before=0.0)
        if again_s is not None:
            self.add(key, now=now, delay_s=again_s)
        elif entry.due is None:
            del self._entries[key]

    def failed(self, key: Key, *, now: float, at_least_s: float = 0.0) -> float:
        """Say that work on a key failed; return after what time it is tried again."""
        entry = replace(self._entries[key], busy=False)
        if entry.urgent:
            self._entries[key] = entry
            return 0.0
        back_off_s = min(FIRST_DELAY_S * FACTOR ** min(entry.n_failures, 30), MAX_DELAY_S)
        until = now + max(at_least_s, back_off_s)
        self._entries[key] = replace(
            entry, due=until, not_before=until, n_failures=entry.n_failures + 1
        )
        return until - now

    def wait_s(self, now: float) -> float | None:
        """Return how long until a key is due; None if none is to be worked on."""
        times = [
            entry.due
            for entry in self._entries.values()
            if not entry.busy and entry.due is not None
        ]
        return max(0.0, min(times) - now) if times else None
