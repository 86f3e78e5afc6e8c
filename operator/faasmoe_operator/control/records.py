"""What the control remembers of each function's use, beside the autoscaler's windows. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from faasmoe_operator.control.functions import ManagedFunction
from faasmoe_operator.control.popularity import Popularity
from faasmoe_operator.control.reports import LoadReport


class Records:
    """Calls, rows, last use and popularity of every function, and wakes that wait for an end.

    Args:
        functions: every function by id.
        rows: popularity from before, by the functions' shapes.
        now: the time.
    """

    def __init__(
        self,
        functions: Mapping[str, ManagedFunction],
        *,
        rows: Mapping[str, float] | None = None,
        now: float,
    ) -> None:
        self._shapes = {name: function.shape for name, function in functions.items()}
        known = rows or {}
        counts = {name: known[shape] for name, shape in self._shapes.items() if shape in known}
        self._popularity = Popularity(counts, now=now)
        self._last_used: dict[str, float] = {}
        self._asked: dict[str, float] = {}
        self._woken: dict[str, float] = {}
        self.calls: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()

    def take(self, report: LoadReport, *, now: float) -> None:
        """Count what a report says."""
        for name, load in report.functions.items():
            self.calls[name] += load.calls
            self.rows[name] += load.rows
            if load.calls > 0 or load.concurrency > 0:
                self._last_used[name] = now
        self._popularity.add(((n, f.rows) for n, f in report.functions.items()), now=now)

    def order(self) -> list[str]:
        """Return every function, the most popular first; the model's order among equals."""
        return self._popularity.order(list(self._shapes))

    def popular(self, now: float) -> list[str]:
        """Return the functions that were used lately, the most popular first."""
        rows = self._popularity.rows(now)
        return [name for name in self.order() if name in rows]

    def popularity(self, now: float) -> dict[str, float]:
        """Return the popularity by the functions' shapes, for a later run."""
        return {self._shapes[name]: rows for name, rows in self._popularity.rows(now).items()}

    def idle_s(self, function: str, *, now: float) -> float | None:
        """Return how long ago a function was used last; None if it was not."""
        last = self._last_used.get(function)
        return None if last is None else now - last

    def asked(self, function: str, *, now: float) -> None:
        """Note that a caller waits for a function."""
        self._asked[function] = now

    def last_used(self) -> dict[str, float]:
        """Return when each function was used last, or waited for."""
        asked = {f: max(at, self._last_used.get(f, at)) for f, at in self._asked.items()}
        return {**self._last_used, **asked}

    def woken(self, function: str, *, now: float) -> None:
        """Note that a wake brings a function up from zero."""
        self._woken.setdefault(function, now)

    def activated(self, function: str, *, now: float) -> float | None:
        """Return how long ago the wake was that this function's start ends; None if none did."""
        begun = self._woken.pop(function, None)
        return None if begun is None else now - begun

    def waiting(self) -> list[str]:
        """Return the functions that were woken and do not serve yet."""
        return list(self._woken)
