"""Memory that several functions map at once: it is held once, in equal parts. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from faasmoe_operator.plan.fleet import MemoryHolder


@dataclass(frozen=True, slots=True)
class _HeldFunctions:
    """What one model's functions hold.

    Attributes:
        holders: the functions.
        places: positions of those that map a content, by content.
        staying: how many of them stay, by content.
        leaving: how many leave.
    """

    holders: Sequence[MemoryHolder]
    places: Mapping[str, list[int]]
    staying: Counter[str]
    leaving: Counter[str]

    @classmethod
    def of(cls, holders: Sequence[MemoryHolder]) -> Self:
        """Look at what a model's functions hold."""
        places: dict[str, list[int]] = {}
        leaving: Counter[str] = Counter()
        for position, holder in enumerate(holders):
            if holder.content:
                places.setdefault(holder.content, []).append(position)
                leaving[holder.content] += holder.is_leaving
        counts = Counter({content: len(found) for content, found in places.items()})
        return cls(holders, places, counts - leaving, +leaving)


class SharedFunctions:
    """What the functions of several models hold, with their parts of what they share.

    Parts add up to what is held. What leaves counts nothing while others stay that map the same:
    its memory stays with them.

    Args:
        whole: what each model's functions hold, each for itself.
        before: the same of a moment ago, whose parts are taken over where nothing has changed.

    Attributes:
        whole: as given.
        parts: the same, divided.
        resident: contents that somebody holds who stays.
    """

    def __init__(
        self,
        whole: Mapping[str, Sequence[MemoryHolder]],
        before: SharedFunctions | None = None,
    ) -> None:
        earlier: Mapping[str, _HeldFunctions] = {} if before is None else before._held
        self.whole = whole
        self._held: dict[str, _HeldFunctions] = {
            model: found
            if (found := earlier.get(model)) is not None and found.holders is held
            else _HeldFunctions.of(held)
            for model, held in whole.items()
        }
        gone = [found for model, found in earlier.items() if self._held.get(model) is not found]
        new = [found for model, found in self._held.items() if earlier.get(model) is not found]
        self._staying: Counter[str] = _changed_counts(
            Counter() if before is None else before._staying,
            gone=[found.staying for found in gone],
            new=[found.staying for found in new],
        )
        self._leaving: Counter[str] = _changed_counts(
            Counter() if before is None else before._leaving,
            gone=[found.leaving for found in gone],
            new=[found.leaving for found in new],
        )
        self.resident = frozenset(self._staying)
        self.parts = self._all_parts(before, gone, new)

    def extra_bytes(self, model: str) -> int:
        """Return what a model's functions that stay count beyond what they map, or below 0."""
        pairs = zip(self.whole.get(model, ()), self.parts.get(model, ()), strict=True)
        return sum(
            part.size_bytes - (holder.size_bytes - holder.private_bytes)
            for holder, part in pairs
            if not holder.is_leaving
        )

    def _all_parts(
        self,
        before: SharedFunctions | None,
        gone: Iterable[_HeldFunctions],
        new: Iterable[_HeldFunctions],
    ) -> dict[str, tuple[MemoryHolder, ...]]:
        if before is None:
            return {model: self._parts(held) for model, held in self._held.items()}
        changed = {
            content
            for content in {content for held in (*gone, *new) for content in held.places}
            if self._n_sharing(content) != before._n_sharing(content)
        }
        return {
            model: self._changed_parts(held, before.parts[model], changed)
            if before._held.get(model) is held
            else self._parts(held)
            for model, held in self._held.items()
        }

    def _parts(self, held: _HeldFunctions) -> tuple[MemoryHolder, ...]:
        return tuple(map(self._part, held.holders))

    def _changed_parts(
        self, held: _HeldFunctions, parts: tuple[MemoryHolder, ...], changed: set[str]
    ) -> tuple[MemoryHolder, ...]:
        """Return parts of a moment ago, but those of contents that others have left or joined."""
        affected = changed & held.places.keys()
        if not affected:
            return parts
        now = list(parts)
        for content in affected:
            for position in held.places[content]:
                now[position] = self._part(held.holders[position])
        return tuple(now)

    def _n_sharing(self, content: str) -> tuple[int, int]:
        """Return how many hold the same, those that leave last."""
        return self._staying.get(content, 0), self._leaving.get(content, 0)

    def _part(self, holder: MemoryHolder) -> MemoryHolder:
        n_staying, n_leaving = self._n_sharing(holder.content)
        n_sharing = n_staying or n_leaving
        if not holder.content or (n_sharing == 1 and not (holder.is_leaving and n_staying)):
            return holder
        shared_bytes = holder.size_bytes - holder.private_bytes
        part_bytes = 0 if holder.is_leaving and n_staying else -(-shared_bytes // n_sharing)
        return holder.changed(size_bytes=holder.private_bytes + part_bytes)


def _changed_counts(
    before: Counter[str], *, gone: Iterable[Counter[str]], new: Iterable[Counter[str]]
) -> Counter[str]:
    """Return counts without those of what is gone, and with those of what is new; none is 0."""
    counts = Counter(before)
    for found in gone:
        counts.subtract(found)
    for found in new:
        counts.update(found)
    return +counts
