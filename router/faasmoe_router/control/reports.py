"""Load reports: two readings of the meters make the averages of the time between. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from faasmoe_router.dispatch.load import Reading

_DIGITS = 6


@dataclass(frozen=True, slots=True)
class FunctionLoad:
    """One function's load over an interval.

    Attributes:
        concurrency: time average of the calls in flight, those that are held included.
        calls: calls begun.
        rows: rows that they carried.
    """

    concurrency: float
    calls: int
    rows: int

    @property
    def is_idle(self) -> bool:
        """Whether there was none."""
        return not (self.concurrency or self.calls)

    def to_json(self) -> dict[str, float | int]:
        """Return the JSON object of this load."""
        return {"concurrency": self.concurrency, "calls": self.calls, "rows": self.rows}


def merge(readings: Iterable[Mapping[str, Reading]]) -> dict[str, Reading]:
    """Add up the readings of several meters."""
    total: dict[str, Reading] = {}
    for reading in readings:
        for name, (in_flight_s, calls, rows) in reading.items():
            before = total.get(name, Reading())
            total[name] = Reading(
                before.in_flight_s + in_flight_s, before.calls + calls, before.rows + rows
            )
    return total


class LoadAverager:
    """Turns totals that grow for ever into loads by interval."""

    def __init__(self, now_s: float) -> None:
        self._before_s = now_s
        self._before: Mapping[str, Reading] = {}

    def take(
        self, now_s: float, now: Mapping[str, Reading]
    ) -> tuple[float, dict[str, FunctionLoad]]:
        """Return the interval since the last call, in seconds, and each function's load in it."""
        interval_s = max(now_s - self._before_s, 1e-9)
        loads = {}
        for name, (in_flight_s, calls, rows) in now.items():
            before = self._before.get(name, Reading())
            average = (in_flight_s - before.in_flight_s) / interval_s
            loads[name] = FunctionLoad(
                max(0.0, round(average, _DIGITS)), calls - before.calls, rows - before.rows
            )
        self._before_s, self._before = now_s, now
        return interval_s, loads


class PassMemory:
    """Knows the load of functions that a pass through the model's layers has not come to yet.

    Each function is called once in a pass, at its layer's turn. A pass may take longer than the
    interval of the reports, or even than the window after which an idle function goes: the first
    one after a start, on a busy machine. A function that is not called in such an interval is not
    idle; its last load stands until a whole pass has left it out.
    """

    def __init__(self) -> None:
        self._last_pass: dict[str, FunctionLoad] = {}
        self._since: dict[str, FunctionLoad] = {}
        self._n_begun = 0

    def fill(
        self, loads: Mapping[str, FunctionLoad], *, n_begun: int, is_busy: bool
    ) -> dict[str, FunctionLoad]:
        """Return the loads of an interval, with those that stand.

        Args:
            loads: of each function.
            n_begun: passes that began in the interval.
            is_busy: whether requests are computed at its end.
        """
        called = {name: load for name, load in loads.items() if not load.is_idle}
        if not is_busy:
            self._last_pass, self._since, self._n_begun = {}, called, 0
            return dict(loads)
        self._since |= called
        self._n_begun += n_begun
        if self._n_begun >= 2:  # between two beginnings lies a whole pass
            self._last_pass, self._since, self._n_begun = self._since, {}, 0
        standing = self._last_pass | self._since
        return {**loads, **{n: replace(x, calls=0, rows=0) for n, x in standing.items()}, **called}


def report_body(
    loads: Mapping[str, FunctionLoad],
    *,
    router: str,
    sent_at_s: float,
    interval_s: float,
    known: Collection[str],
    held: int,
    local: int,
) -> dict[str, Any]:
    """Return the body of a load report: of the functions that are known, those that have load."""
    busy = {name: load for name, load in loads.items() if name in known and not load.is_idle}
    return {
        "router": router,
        "sent_at_s": sent_at_s,
        "interval_s": interval_s,
        "functions": {name: load.to_json() for name, load in busy.items()},
        "held": held,
        "local": local,
    }
