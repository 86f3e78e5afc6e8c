"""Memory that several functions map at once: it is held once, in equal parts. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from faasmoe_operator.plan.fleet import MemoryHolder


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
        sharing = [holder for held in whole.values() for holder in held if holder.content]
        self.whole = whole
        self._leaving = Counter(holder.content for holder in sharing if holder.is_leaving)
        self._staying = Counter(holder.content for holder in sharing if not holder.is_leaving)
        self.resident = frozenset(self._staying)
        self.parts = {model: tuple(self._parts(model, before)) for model in whole}

    def extra_bytes(self, model: str) -> int:
        """Return what a model's functions that stay count beyond what they map, or below 0."""
        pairs = zip(self.whole.get(model, ()), self.parts.get(model, ()), strict=True)
        return sum(
            part.size_bytes - (holder.size_bytes - holder.private_bytes)
            for holder, part in pairs
            if not holder.is_leaving
        )

    def _parts(self, model: str, before: SharedFunctions | None) -> Iterator[MemoryHolder]:
        held = self.whole[model]
        if before is None or before.whole.get(model) is not held:
            yield from map(self._part, held)
            return
        for holder, part in zip(held, before.parts[model], strict=True):
            is_same = self._n_sharing(holder) == before._n_sharing(holder)
            yield part if is_same else self._part(holder)

    def _n_sharing(self, holder: MemoryHolder) -> tuple[int, int]:
        """Return how many hold the same, those that leave last."""
        return self._staying.get(holder.content, 0), self._leaving.get(holder.content, 0)

    def _part(self, holder: MemoryHolder) -> MemoryHolder:
        n_staying, n_leaving = self._n_sharing(holder)
        n_sharing = n_staying or n_leaving
        if not holder.content or (n_sharing == 1 and not (holder.is_leaving and n_staying)):
            return holder
        shared_bytes = holder.size_bytes - holder.private_bytes
        part_bytes = 0 if holder.is_leaving and n_staying else -(-shared_bytes // n_sharing)
        return holder.changed(size_bytes=holder.private_bytes + part_bytes)
