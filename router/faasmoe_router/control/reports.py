"""Load reports: two readings of the meters make the averages of the time between. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
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


def report_body(
    loads: Mapping[str, FunctionLoad],
    *,
    router: str,
    sent_at_s: float,
    interval_s: float,
    known: Collection[str],
    held: int,
    local: int,
    tenants: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return the body of a load report: of the functions that are known, those that have load.

    How many keys each tenant has is told where there are tenants.
    """
    busy = {name: load for name, load in loads.items() if name in known and not load.is_idle}
    return {
        "router": router,
        "sent_at_s": sent_at_s,
        "interval_s": interval_s,
        "functions": {name: load.to_json() for name, load in busy.items()},
        "held": held,
        "local": local,
        **({} if tenants is None else {"tenants": dict(tenants)}),
    }
