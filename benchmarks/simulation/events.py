"""The discrete-event clock: events at simulated seconds, in order of time, then of scheduling."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class Event:
    """One scheduled call; `cancel` makes it do nothing."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Drop the call."""
        self._call = None

    def fire(self) -> None:
        """Make the call, unless it was cancelled."""
        if self._call is not None:
            self._call()


class EventLoop:
    """Runs events; `now` is the simulated time in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Event]] = []
        self._numbers = itertools.count()

    def at(self, time_s: float, call: Callable[[], None]) -> Event:
        """Schedule a call at a time; a time that has passed is now."""
        event = Event(call)
        heapq.heappush(self._heap, (max(time_s, self.now), next(self._numbers), event))
        return event

    def after(self, delay_s: float, call: Callable[[], None]) -> Event:
        """Schedule a call `delay_s` seconds from now."""
        return self.at(self.now + delay_s, call)

    def run_until(self, end_s: float) -> None:
        """Run all events up to and including `end_s`; the time is `end_s` afterwards."""
        while self._heap and self._heap[0][0] <= end_s:
            self.now, _, event = heapq.heappop(self._heap)
            event.fire()
        self.now = max(self.now, end_s)


class Integral:
    """The integral over time of a value that changes in steps, and its maximum."""

    __slots__ = ("_loop", "_since_s", "_total", "maximum", "value")

    def __init__(self, loop: EventLoop, value: float = 0.0) -> None:
        self._loop = loop
        self._since_s = loop.now
        self._total = 0.0
        self.value = value
        self.maximum = value

    def add(self, delta: float) -> None:
        """Change the value from now on."""
        self._total += self.value * (self._loop.now - self._since_s)
        self._since_s = self._loop.now
        self.value += delta
        self.maximum = max(self.maximum, self.value)

    @property
    def total(self) -> float:
        """The integral until now, in units of the value times seconds."""
        return self._total + self.value * (self._loop.now - self._since_s)
