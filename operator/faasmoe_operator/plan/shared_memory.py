"""Memory that several functions map at once: it is held once, in equal parts. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from faasmoe_operator.plan.fleet import MemoryHolder


class SharedFunctions:
    """What the functions of several models hold, with their parts of what they share.

    Parts add up to what is held. What leaves counts nothing while others stay that map the same:
    its memory stays with them.

    Args:
        whole: what each model's functions hold, each for itself.

    Attributes:
        whole: as given.
        parts: the same, divided.
        resident: contents that somebody holds who stays.
    """

    def __init__(self, whole: Mapping[str, Sequence[MemoryHolder]]) -> None:
        sharing = [holder for held in whole.values() for holder in held if holder.content]
        self.whole = whole
        self._leaving = Counter(holder.content for holder in sharing if holder.is_leaving)
        self._staying = Counter(holder.content for holder in sharing if not holder.is_leaving)
        self.resident = frozenset(self._staying)
        self.parts = {model: tuple(map(self._part, held)) for model, held in whole.items()}

    def extra_bytes(self, model: str) -> int:
        """Return what a model's functions that stay count beyond what they map, or below 0."""
        pairs = zip(self.whole.get(model, ()), self.parts.get(model, ()), strict=True)
        return sum(
            part.size_bytes - (holder.size_bytes - holder.private_bytes)
            for holder, part in pairs
            if not holder.is_leaving
        )

    def _part(self, holder: MemoryHolder) -> MemoryHolder:
        n_staying = self._staying[holder.content]
        n_sharing = n_staying or self._leaving[holder.content]
        if not holder.content or (n_sharing == 1 and not (holder.is_leaving and n_staying)):
            return holder
        shared_bytes = holder.size_bytes - holder.private_bytes
        part_bytes = 0 if holder.is_leaving and n_staying else -(-shared_bytes // n_sharing)
        return holder.changed(size_bytes=holder.private_bytes + part_bytes)
