"""Sets of indices as people write them: "0-3,7"."""

from __future__ import annotations

import re
from collections.abc import Iterable

from faasmoe_operator.spec.patterns import INDICES, WORDS


def parse_ranges(text: str) -> frozenset[int]:
    """Return the indices of a text such as "0-3,7"; raises ValueError with what was expected."""
    if not re.fullmatch(INDICES, text):
        raise ValueError(WORDS[INDICES])
    indices: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            raise ValueError(f"the range {part} to rise")
        indices.update(range(int(first), int(last or first) + 1))
    return frozenset(indices)


def format_ranges(indices: Iterable[int]) -> str:
    """Return indices as such a text, with runs of neighbours as ranges."""
    runs: list[tuple[int, int]] = []
    for index in sorted(set(indices)):
        if runs and index == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs)
