"""Usage of each function: counters, last use, activations in progress and popularity. Pure.

Popularity is a count of rows that decays by half every `HALF_LIFE_S`. It determines the order in
which functions are placed and which weights are read ahead. As an aggregate over all tenants and
requests it reveals nothing of a single one. It survives restarts as JSON, keyed by the functions'
stable keys; a damaged file or one of another model counts as empty.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from faasmoe_contracts.control_messages import LoadReport
from faasmoe_operator.control.functions import ManagedFunction

HALF_LIFE_S = 600.0
MIN_ROWS = 0.01
POPULARITY_FORMAT_VERSION = 1
POPULARITY_DECODE_ERRORS = (ValueError, KeyError, TypeError, RecursionError)
"""Exceptions that `decode_popularity` raises for an invalid text."""


class FunctionStats:
    """Usage of every function of a model.

    Args:
        functions: the functions by id.
        rows: decayed row counts of an earlier run, by stable key.
        now: current time in seconds.

    Attributes:
        calls: total number of calls by function.
        rows: total number of rows by function.
        version: increases with everything that may have changed when functions were used.
    """

    def __init__(
        self,
        functions: Mapping[str, ManagedFunction],
        *,
        rows: Mapping[str, float] | None = None,
        now: float,
    ) -> None:
        self._stable_keys = {name: function.stable_key for name, function in functions.items()}
        saved = rows or {}
        counts = {name: saved[key] for name, key in self._stable_keys.items() if key in saved}
        self._popularity = FunctionPopularity(counts, now=now)
        self._last_used: dict[str, float] = {}
        self._requested_at: dict[str, float] = {}
        self._activation_started_at: dict[str, float] = {}
        self._late_activations: set[str] = set()  # already returned by newly_late_activations
        self.calls: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()
        self.version = 0

    def add_load_report(self, report: LoadReport, *, now: float) -> None:
        """Add a router's load report."""
        for name, load in report.functions.items():
            self.calls[name] += load.calls
            self.rows[name] += load.rows
            if load.calls > 0 or load.concurrency > 0:
                self._last_used[name] = now
                self.version += 1
        self._popularity.add(((n, f.rows) for n, f in report.functions.items()), now=now)

    def by_popularity(self) -> list[str]:
        """Return every function, the most popular first; ties keep the model's order."""
        return self._popularity.sorted_by_rows(list(self._stable_keys))

    def recently_used(self, now: float) -> list[str]:
        """Return the functions with a popularity above `MIN_ROWS`, the most popular first."""
        rows = self._popularity.rows(now)
        return [name for name in self.by_popularity() if name in rows]

    def popularity_by_stable_key(self, now: float) -> dict[str, float]:
        """Return the popularity by stable key, for a later run."""
        return {self._stable_keys[name]: rows for name, rows in self._popularity.rows(now).items()}

    def idle_s(self, function: str, *, now: float) -> float | None:
        """Return the seconds since a function's last use; None if it was never used."""
        last_used = self._last_used.get(function)
        return None if last_used is None else now - last_used

    def record_request(self, function: str, *, now: float) -> None:
        """Record that a request waits for a function."""
        self._requested_at[function] = now
        self.version += 1

    def last_used(self) -> dict[str, float]:
        """Return the time of each function's last use or of the last request that waited for it."""
        requested_at = {
            f: max(at, self._last_used.get(f, at)) for f, at in self._requested_at.items()
        }
        return {**self._last_used, **requested_at}

    def start_activation(self, function: str, *, now: float) -> None:
        """Record that a function is scaled up from zero."""
        self._activation_started_at.setdefault(function, now)

    def finish_activation(self, function: str, *, now: float) -> float | None:
        """End an activation; return its duration in seconds, or None if there was none."""
        started_at = self._activation_started_at.pop(function, None)
        self._late_activations.discard(function)
        return None if started_at is None else now - started_at

    def newly_late_activations(self, deadline_s: float, *, now: float) -> list[str]:
        """Return the activations that last longer than `deadline_s`; each is returned once."""
        late = {f for f, at in self._activation_started_at.items() if now - at >= deadline_s}
        newly_late = late - self._late_activations
        self._late_activations |= newly_late
        return sorted(newly_late)

    def activating_since(self, functions: Iterable[str]) -> dict[str, float]:
        """Return when the activation began, of those functions that are not ready yet."""
        started_at = self._activation_started_at
        return {name: started_at[name] for name in functions if name in started_at}

    def activating(self) -> list[str]:
        """Return the functions that are scaled up from zero and not ready yet."""
        return list(self._activation_started_at)


class FunctionPopularity:
    """Row counts by function that decay by half every `HALF_LIFE_S` seconds.

    Args:
        rows: decayed counts of an earlier run, at `now`.
        now: current time in seconds.
    """

    def __init__(self, rows: Mapping[str, float] | None = None, *, now: float) -> None:
        self._rows = dict(rows or {})
        self._decayed_at = now

    def add(self, rows: Iterable[tuple[str, int]], *, now: float) -> None:
        """Add (function, rows) pairs to the counts."""
        self._decay(now)
        for name, count in rows:
            self._rows[name] = self._rows.get(name, 0.0) + count

    def rows(self, now: float) -> dict[str, float]:
        """Return the counts above `MIN_ROWS`."""
        self._decay(now)
        return {name: rows for name, rows in self._rows.items() if rows > MIN_ROWS}

    def sorted_by_rows(self, names: Sequence[str]) -> list[str]:
        """Return the names, the most popular first; ties keep their order."""
        return sorted(names, key=lambda name: -self._rows.get(name, 0.0))

    def _decay(self, now: float) -> None:
        factor = 0.5 ** (max(0.0, now - self._decayed_at) / HALF_LIFE_S)
        self._decayed_at = max(now, self._decayed_at)
        if factor < 1.0:
            self._rows = {name: rows * factor for name, rows in self._rows.items()}


def encode_popularity(rows: Mapping[str, float], *, model_digest: str, now_s: float) -> str:
    """Encode popularity as JSON.

    Args:
        rows: decayed counts by stable key.
        model_digest: digest of the model's store.
        now_s: Unix time in seconds.
    """
    value = {
        "version": POPULARITY_FORMAT_VERSION,
        "model_digest": model_digest,
        "written_at_s": round(now_s, 3),
        "rows": {key: round(count, 3) for key, count in rows.items()},
    }
    return json.dumps(value)


def decode_popularity(text: str, *, model_digest: str, now_s: float) -> dict[str, float]:
    """Decode popularity and decay it to the current time; empty if it is of another model.

    Args:
        text: JSON of `encode_popularity`.
        model_digest: digest of the model's store.
        now_s: Unix time in seconds.

    Returns:
        Decayed counts by stable key.

    Raises:
        ValueError, KeyError, TypeError, RecursionError: the text is invalid.
    """
    value = json.loads(text)
    if (value["version"], value["model_digest"]) != (POPULARITY_FORMAT_VERSION, model_digest):
        return {}
    rows, written_at_s = value["rows"], value["written_at_s"]
    if not isinstance(rows, dict) or not isinstance(written_at_s, int | float):
        raise TypeError("rows: expected an object; written_at_s: expected a number")
    factor = 0.5 ** (max(0.0, now_s - written_at_s) / HALF_LIFE_S)
    return {str(key): _parse_count(count) * factor for key, count in rows.items()}


def _parse_count(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"rows: got {value!r}, expected numbers")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"rows: got {value!r}, expected numbers of 0 or more")
    return float(value)
