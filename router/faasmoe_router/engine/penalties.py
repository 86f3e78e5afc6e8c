"""Penalties for repetition: which tokens a sequence has, how often, and what that costs them.

As vLLM has it: the repetition penalty (of CTRL) regards prompt and output, presence and frequency
(of OpenAI) the output alone. What is kept for a sequence grows by a token at a time and holds each
different token once, so a step costs what the sequence has seen and not what the vocabulary holds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """What a request asks for.

    Attributes:
        presence: taken from the score of every token that was generated.
        frequency: taken from a token's score each time that it was generated.
        repetition: divides the positive and multiplies the negative scores of tokens in the prompt
            or the output; 1 changes nothing.
    """

    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0

    @property
    def neutral(self) -> bool:
        """Whether they change nothing."""
        return self.presence == 0 and self.frequency == 0 and self.repetition == 1


class TokenCounts:
    """The different tokens of one sequence, and how often each was generated.

    Args:
        prompt_ids: tokens that count as seen and not as generated.
        n_output: the most tokens that may be generated.
    """

    def __init__(self, prompt_ids: Iterable[int], *, n_output: int) -> None:
        self._slots = {token: slot for slot, token in enumerate(dict.fromkeys(prompt_ids))}
        capacity = len(self._slots) + n_output
        self._ids = torch.empty(capacity, dtype=torch.int64)
        self._counts = torch.zeros(capacity)
        self._ids[: len(self._slots)] = torch.tensor(list(self._slots), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._slots)

    def add(self, tokens: Iterable[int]) -> None:
        """Count tokens that were generated."""
        for token in tokens:
            slot = self._slots.setdefault(token, len(self._slots))
            self._ids[slot] = token
            self._counts[slot] += 1

    @property
    def ids(self) -> Tensor:
        """The different tokens, [U]."""
        return self._ids[: len(self)]

    @property
    def counts(self) -> Tensor:
        """How often each was generated, [U]."""
        return self._counts[: len(self)]


@dataclass(frozen=True, slots=True)
class Penalized:
    """One row of the scores, with what is taken from it."""

    row: int
    penalties: Penalties
    tokens: TokenCounts


def penalize(scores: Tensor, rows: Sequence[Penalized]) -> None:
    """Take the penalties from the scores, [N, V], in place; other rows stay as they are."""
    if not rows:
        return
    device = scores.device
    ids = torch.cat([row.tokens.ids for row in rows]).to(device)  # [E]
    counts = torch.cat([row.tokens.counts for row in rows]).to(device)  # [E]
    asked = torch.tensor([_numbers(row) for row in rows], dtype=torch.float64)  # [R, 4]
    n_each = torch.tensor([len(row.tokens) for row in rows])  # [R]
    index, presence, frequency, repetition = (
        asked.repeat_interleave(n_each, dim=0).to(device).unbind(1)  # [E] each
    )
    at = index.long(), ids
    values = scores[at].double()  # [E]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= frequency * counts + presence * (counts > 0)
    scores[at] = values.to(scores.dtype)


def _numbers(row: Penalized) -> tuple[float, float, float, float]:
    asked = row.penalties
    return row.row, asked.presence, asked.frequency, asked.repetition
