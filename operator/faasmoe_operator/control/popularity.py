"""How much each function is used: rows, halved every half-life. Pure.

Decides the order in which functions are woken and what is read ahead. An aggregate over all
tenants and requests: it tells nothing of any one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

HALF_LIFE_S = 600.0
NEGLIGIBLE_ROWS = 0.01


class Popularity:
    """Decayed counts by name.

    Args:
        rows: counts from before, as they are at `now`.
        now: the time.
    """

    def __init__(self, rows: Mapping[str, float] | None = None, *, now: float) -> None:
        self._rows = dict(rows or {})
        self._at = now

    def add(self, rows: Iterable[tuple[str, int]], *, now: float) -> None:
        """Count rows of functions."""
        self._decay(now)
        for name, count in rows:
            self._rows[name] = self._rows.get(name, 0.0) + count

    def rows(self, now: float) -> dict[str, float]:
        """Return the counts that are not negligible."""
        self._decay(now)
        return {name: rows for name, rows in self._rows.items() if rows > NEGLIGIBLE_ROWS}

    def order(self, names: Sequence[str]) -> list[str]:
        """Return the names, the most popular first; equals keep their order."""
        return sorted(names, key=lambda name: -self._rows.get(name, 0.0))

    def _decay(self, now: float) -> None:
        factor = 0.5 ** (max(0.0, now - self._at) / HALF_LIFE_S)
        self._at = max(now, self._at)
        if factor < 1.0:
            self._rows = {name: rows * factor for name, rows in self._rows.items()}
