"""Biases: what a request adds to certain tokens' scores, and which tokens it forbids.

A token is forbidden by adding minus infinity, so that biases, bad words and end tokens that come
too early are one sparse addition for the whole batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FORBIDDEN = -torch.inf


@dataclass(frozen=True, slots=True)
class Bias:
    """What a request asks for.

    Attributes:
        added: tokens, and what is added to their scores.
        allowed: the only tokens that may be generated; None allows all.
        bad_words: sequences of tokens that may not be generated.
    """

    added: tuple[tuple[int, float], ...] = ()
    allowed: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()

    @property
    def neutral(self) -> bool:
        """Whether it changes nothing."""
        return not self.added and self.allowed is None and not self.bad_words

    @property
    def longest_bad_word(self) -> int:
        """The tokens of the longest of the bad words."""
        return max(map(len, self.bad_words), default=0)

    def changes(self, output: Sequence[int]) -> list[tuple[int, float]]:
        """Return what is added to which tokens after an output, of which the end will do."""
        changes = list(self.added)
        for *beginning, last in self.bad_words:
            if not beginning or list(output[-len(beginning) :]) == beginning:
                changes.append((last, FORBIDDEN))
        return changes


@dataclass(frozen=True, slots=True)
class Biased:
    """One row of the scores, with what is done to it."""

    row: int
    changes: Sequence[tuple[int, float]]
    allowed: tuple[int, ...] | None = None


def add_biases(scores: Tensor, rows: Sequence[Biased]) -> None:
    """Apply the biases to the scores, [N, V], in place; other rows stay as they are."""
    for row in rows:
        if row.allowed is not None:
            _keep_only(scores[row.row], row.allowed)
    changes = [(row.row, token, value) for row in rows for token, value in row.changes]
    if not changes:
        return
    index, tokens, values = zip(*changes, strict=True)
    at = torch.tensor([index, tokens], device=scores.device).unbind()  # [C] each
    added = torch.tensor(values, dtype=scores.dtype, device=scores.device)  # [C]
    scores.index_put_(at, added, accumulate=True)


def _keep_only(scores: Tensor, allowed: Sequence[int]) -> None:
    ids = torch.tensor(allowed, device=scores.device)  # [A]
    kept = scores[ids]  # [A]
    scores.fill_(FORBIDDEN)
    scores[ids] = kept
