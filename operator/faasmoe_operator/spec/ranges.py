"""Sets of indices as people write them: "0-3,7"."""

from __future__ import annotations

import re

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
