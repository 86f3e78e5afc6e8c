"""How far two runs wrote the same, request by request. Pure.

Greedy texts of equal models are equal as long as the scores' order is. With fp32 it is; with bf16
sums that are added in another order move near-ties, so full models differ among themselves too, and
what they agree on is the measure.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Texts = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far texts agree.

    Attributes:
        equal_texts: the part of requests whose whole text is the same.
        equal_characters: the part of characters before the first difference of their request.
    """

    equal_texts: float
    equal_characters: float


def agreement(some: Texts, others: Texts) -> Agreement | None:
    """Return how far the texts of requests that both answered agree; None if there is none."""
    pairs = [(some[name], others[name]) for name in some if name in others]
    if not pairs:
        return None
    equal = sum(a == b for a, b in pairs)
    lengths = sum(max(len(a), len(b)) for a, b in pairs)
    same = sum(_common_prefix(a, b) for a, b in pairs)
    return Agreement(equal / len(pairs), same / lengths if lengths else 1.0)


def mean_agreement(runs: Sequence[Texts], references: Sequence[Texts]) -> Agreement | None:
    """Return the mean over all pairs of a run and a reference, but for a run with itself."""
    found = [agreement(a, b) for a in runs for b in references if a is not b]
    some = [one for one in found if one is not None]
    if not some:
        return None
    return Agreement(
        sum(one.equal_texts for one in some) / len(some),
        sum(one.equal_characters for one in some) / len(some),
    )


def _common_prefix(a: str, b: str) -> int:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return sum(1 for _ in same)
