"""What a store makes of the formats that a checkpoint is published in, and what that costs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from faasmoe_contracts.store.json_fields import JsonFields

PARTS = ("experts", "router")
MAX_NAMES_SHOWN = 3
_LAYER_INDEX = re.compile(r"\.(\d{1,9})\.")
_GB = 1e9


@dataclass(frozen=True, slots=True)
class PublishedEntry:
    """Weights in one format of which a store makes the same.

    Attributes:
        part: `experts` or `router`.
        format: their format in the checkpoint, such as `fp8 128 x 128`.
        outcome: what they are in the store, such as `dequantised to bfloat16`.
        weights: their names, see `collapse_layers`.
        count: the number of weights.
        published_bytes: bytes in the checkpoint, scales included.
        stored_bytes: bytes in the store, scales included.
    """

    part: str
    format: str
    outcome: str
    weights: tuple[str, ...]
    count: int
    published_bytes: int
    stored_bytes: int

    @classmethod
    def from_json(cls, value: object, *, path: str) -> PublishedEntry:
        """Parse an entry; raises StoreError naming the field."""
        fields = JsonFields(value, path)
        weights = fields.pop_array("weights")
        if not weights or not all(isinstance(name, str) for name in weights):
            raise fields.error("weights", weights, "names")
        entry = cls(
            part=fields.pop_choice("part", PARTS),
            format=fields.pop_string("format"),
            outcome=fields.pop_string("outcome"),
            weights=tuple(weights),
            count=fields.pop_integer("count", minimum=1),
            published_bytes=fields.pop_integer("published_bytes", minimum=1),
            stored_bytes=fields.pop_integer("stored_bytes", minimum=1),
        )
        fields.reject_unknown()
        return entry

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this entry."""
        value = {name: getattr(self, name) for name in self.__slots__}
        return value | {"weights": list(self.weights)}

    def __str__(self) -> str:
        """Return a line that says what becomes of the weights, in how many bytes."""
        stored, published = self.stored_bytes / _GB, self.published_bytes / _GB
        return (
            f"{self.part}: {self.count} weights in {self.format} are {self.outcome}: "
            f"{stored:.3g} GB, {self.stored_bytes / self.published_bytes:.2f} times the "
            f"{published:.3g} GB of the checkpoint"
        )

    @property
    def where(self) -> str:
        """The names of the weights, the first of them if they are many."""
        more = len(self.weights) - MAX_NAMES_SHOWN
        return ", ".join(self.weights[:MAX_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def collapse_layers(names: Iterable[str]) -> tuple[str, ...]:
    """Return names that differ in the layer's index as one, `model.layers.0-3,7.mlp.gate`."""
    indices: dict[tuple[str, str], list[int]] = {}
    collapsed: dict[str, None] = {}
    for name in names:
        match = _LAYER_INDEX.search(name)
        if match is None:
            collapsed[name] = None
        else:
            key = name[: match.start(1)], name[match.end(1) :]
            indices.setdefault(key, []).append(int(match[1]))
    layers = (f"{before}{_ranges(found)}{after}" for (before, after), found in indices.items())
    return (*layers, *collapsed)


def _ranges(indices: Iterable[int]) -> str:
    """Return `0-3,7` for 0, 1, 2, 3 and 7."""
    ordered = sorted(set(indices))
    starts = [ordered[0], *(after for before, after in pairwise(ordered) if after > before + 1)]
    ends = [*(before for before, after in pairwise(ordered) if after > before + 1), ordered[-1]]
    bounds = zip(starts, ends, strict=True)
    return ",".join(str(start) if start == end else f"{start}-{end}" for start, end in bounds)
