"""How much each function is used: rows, halved every half-life. Pure.

Decides the order in which functions are woken and what is read ahead. An aggregate over all
tenants and requests: it tells nothing of any one of them.

Popularity as text, by which it outlives a control core: JSON, by the functions' shapes. Pure.

It is no secret and no treasure: one that is damaged or of another model is as good as none.

What the control remembers of each function's use, beside the autoscaler's windows. Pure.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from faasmoe_operator.control.functions import ManagedFunction
from faasmoe_operator.control.load_reports import LoadReport

HALF_LIFE_S = 600.0
MIN_ROWS = 0.01


class FunctionPopularity:
    """Decayed counts by name.

    Args:
        rows: counts from before, as they are at `now`.
        now: the time.
    """

    def __init__(self, rows: Mapping[str, float] | None = None, *, now: float) -> None:
        self._rows = dict(rows or {})
        self._decayed_at = now

    def add(self, rows: Iterable[tuple[str, int]], *, now: float) -> None:
        """Count rows of functions."""
        self._decay(now)
        for name, count in rows:
            self._rows[name] = self._rows.get(name, 0.0) + count

    def rows(self, now: float) -> dict[str, float]:
        """Return the counts that are not negligible."""
        self._decay(now)
        return {name: rows for name, rows in self._rows.items() if rows > MIN_ROWS}

    def sorted_by_rows(self, names: Sequence[str]) -> list[str]:
        """Return the names, the most popular first; equals keep their order."""
        return sorted(names, key=lambda name: -self._rows.get(name, 0.0))

    def _decay(self, now: float) -> None:
        factor = 0.5 ** (max(0.0, now - self._decayed_at) / HALF_LIFE_S)
        self._decayed_at = max(now, self._decayed_at)
        if factor < 1.0:
            self._rows = {name: rows * factor for name, rows in self._rows.items()}


POPULARITY_FORMAT_VERSION = 1
POPULARITY_DECODE_ERRORS = (ValueError, KeyError, TypeError, RecursionError)
"""What `decode` raises for a text that cannot be used."""


def encode_popularity(rows: Mapping[str, float], *, model_digest: str, now_s: float) -> str:
    """Return counts as text.

    Args:
        rows: the counts.
        model_digest: digest of the model's store.
        now_s: the time of day, as runs are compared by it.
    """
    value = {
        "version": POPULARITY_FORMAT_VERSION,
        "model_digest": model_digest,
        "written_at_s": round(now_s, 3),
        "rows": {shape: round(count, 3) for shape, count in rows.items()},
    }
    return json.dumps(value)


def decode_popularity(text: str, *, model_digest: str, now_s: float) -> dict[str, float]:
    """Return the counts as they are now, nothing if they are another model's; raises DAMAGED."""
    value = json.loads(text)
    if (value["version"], value["model_digest"]) != (POPULARITY_FORMAT_VERSION, model_digest):
        return {}
    rows, written_at_s = value["rows"], value["written_at_s"]
    if not isinstance(rows, dict) or not isinstance(written_at_s, int | float):
        raise TypeError("rows: expected an object; written_at_s: expected a number")
    factor = 0.5 ** (max(0.0, now_s - written_at_s) / HALF_LIFE_S)
    return {str(shape): _parse_count(count) * factor for shape, count in rows.items()}


def _parse_count(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"rows: got {value!r}, expected numbers")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"rows: got {value!r}, expected numbers of 0 or more")
    return float(value)


class FunctionStats:
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
        self._stable_keys = {name: function.stable_key for name, function in functions.items()}
        known = rows or {}
        counts = {name: known[shape] for name, shape in self._stable_keys.items() if shape in known}
        self._popularity = FunctionPopularity(counts, now=now)
        self._last_used: dict[str, float] = {}
        self._requested_at: dict[str, float] = {}
        self._activation_started_at: dict[str, float] = {}
        self.calls: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()

    def add_load_report(self, report: LoadReport, *, now: float) -> None:
        """Count what a report says."""
        for name, load in report.functions.items():
            self.calls[name] += load.calls
            self.rows[name] += load.rows
            if load.calls > 0 or load.concurrency > 0:
                self._last_used[name] = now
        self._popularity.add(((n, f.rows) for n, f in report.functions.items()), now=now)

    def by_popularity(self) -> list[str]:
        """Return every function, the most popular first; the model's order among equals."""
        return self._popularity.sorted_by_rows(list(self._stable_keys))

    def recently_used(self, now: float) -> list[str]:
        """Return the functions that were used lately, the most popular first."""
        rows = self._popularity.rows(now)
        return [name for name in self.by_popularity() if name in rows]

    def popularity_by_stable_key(self, now: float) -> dict[str, float]:
        """Return the popularity by the functions' shapes, for a later run."""
        return {self._stable_keys[name]: rows for name, rows in self._popularity.rows(now).items()}

    def idle_s(self, function: str, *, now: float) -> float | None:
        """Return how long ago a function was used last; None if it was not."""
        last_used = self._last_used.get(function)
        return None if last_used is None else now - last_used

    def record_request(self, function: str, *, now: float) -> None:
        """Note that a caller waits for a function."""
        self._requested_at[function] = now

    def last_used(self) -> dict[str, float]:
        """Return when each function was used last, or waited for."""
        requested_at = {
            f: max(at, self._last_used.get(f, at)) for f, at in self._requested_at.items()
        }
        return {**self._last_used, **requested_at}

    def start_activation(self, function: str, *, now: float) -> None:
        """Note that a wake brings a function up from zero."""
        self._activation_started_at.setdefault(function, now)

    def finish_activation(self, function: str, *, now: float) -> float | None:
        """Return how long ago the wake was that this function's start ends; None if none did."""
        started_at = self._activation_started_at.pop(function, None)
        return None if started_at is None else now - started_at

    def activating(self) -> list[str]:
        """Return the functions that were woken and do not serve yet."""
        return list(self._activation_started_at)
