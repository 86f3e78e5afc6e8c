"""The last events of a model, none of which names a function. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

MAX_EVENTS = 200
MERGE_WITHIN_S = 1.0


class EventKind(Enum):
    """What happened."""

    ACTIVATED = "activated"
    SCALED_TO_ZERO = "scaled to zero"
    SANDBOX_STARTED = "sandbox started"
    SANDBOX_GONE = "sandbox gone"


@dataclass(slots=True)
class TimelineEvent:
    """Things of one kind that happened together.

    Attributes:
        kind: what happened.
        at: when the first of them happened, seconds.
        count: how many functions or sandboxes.
        longest_s: of activations, the longest time from request to address.
    """

    kind: EventKind
    at: float
    count: int
    longest_s: float | None = None


class Timeline:
    """Keeps the last `MAX_EVENTS` events; those of a kind within a second become one."""

    def __init__(self) -> None:
        self._events: deque[TimelineEvent] = deque(maxlen=MAX_EVENTS)

    def __iter__(self) -> Iterator[TimelineEvent]:
        return iter(self._events)

    def add(
        self, kind: EventKind, *, count: int = 1, longest_s: float | None = None, now: float
    ) -> None:
        """Add an event; counts below 1 are none."""
        if count < 1:
            return
        last = next((e for e in reversed(self._events) if e.kind is kind), None)
        if last is None or now - last.at > MERGE_WITHIN_S:
            self._events.append(TimelineEvent(kind, now, count, longest_s))
            return
        last.count += count
        if longest_s is not None:
            last.longest_s = max(longest_s, last.longest_s or 0.0)
