"""What sandboxes themselves say of their use: the witness when a router cannot be heard. Pure."""

from __future__ import annotations

from collections.abc import Iterable

KEPT_S = 15.0  # three inspections


class Usage:
    """Which functions computed frames lately, by the sandboxes' own counts."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], int] = {}
        self._used: dict[str, float] = {}

    def note(self, sandbox: str, counts: Iterable[tuple[str, int]], *, now: float) -> None:
        """Take how many frames each function in a sandbox has computed so far."""
        for function, count in counts:
            place = (sandbox, function)
            if count > self._counts.get(place, count):
                self._used[function] = now
            self._counts[place] = count

    def lately(self, now: float) -> set[str]:
        """Return the functions that computed between two of the last inspections."""
        self._used = {name: at for name, at in self._used.items() if now - at <= KEPT_S}
        return set(self._used)

    def keep(self, sandboxes: Iterable[str]) -> None:
        """Forget the sandboxes that are not among these."""
        known = set(sandboxes)
        self._counts = {place: n for place, n in self._counts.items() if place[0] in known}
