"""What is done to one request's scores at each token, and what is kept from one to the next.

It travels with the request through transformers' batching, so nothing has to be freed. A preempted
request comes back with part of its output in its prompt; what is kept here counts from the prompt
that was asked for, and is the same object before and after. A step that is computed again, and the
first step of a request that another engine began, find their state by the tokens that there are.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

from faasmoe_router.engine.bias import FORBIDDEN, Biased
from faasmoe_router.engine.generation import GenerationRequest
from faasmoe_router.engine.grammar import Matcher
from faasmoe_router.engine.logprobs import LogprobLog, TokenLogprob
from faasmoe_router.engine.penalties import Penalized, TokenCounts
from faasmoe_router.engine.sampling import Draw


class Steps:
    """One request's steps.

    Attributes:
        logprobs: the log-probabilities that were found and not taken yet.
        ended_after: how many tokens the text has when its grammar lets nothing follow them.
    """

    def __init__(self, request: GenerationRequest, end_ids: Collection[int]) -> None:
        choosing = request.choosing
        self._choosing = choosing
        self._n_prompt = len(request.prompt_ids)
        self._n_output = 0
        self._min_tokens = request.ending.min_tokens
        if choosing.grammar is not None:
            end_ids = {*end_ids, *choosing.grammar.end_ids}
        self._too_early = [(token, FORBIDDEN) for token in end_ids]
        self._counts = _counts(request)
        self._n_counted = 0
        self._n_accepted = 0
        self._n_told = 0
        self.matcher = None if choosing.grammar is None else choosing.grammar.matcher()
        self.logprobs = None if choosing.n_logprobs is None else LogprobLog(choosing.n_logprobs)
        self.ended_after: int | None = None

    @classmethod
    def of(cls, request: GenerationRequest, end_ids: Collection[int]) -> Self | None:
        """Return the steps of a request that ends with these tokens; None if it needs none."""
        if request.choosing.plain and request.ending.min_tokens == 0:
            return None
        return cls(request, end_ids)

    def __deepcopy__(self, memo: Mapping[int, Any]) -> Self:
        """Return itself: transformers copies a request's settings when it preempts it."""
        return self

    def plan(self, row: int, tokens: "TokensSoFar") -> "RowPlan":
        """Return what is to be done to the scores of the next token, which are a batch's row."""
        self._n_output = len(tokens) - self._n_prompt
        self._catch_up(tokens)
        return RowPlan(
            steps=self,
            row=row,
            draw=self._draw(row, len(tokens)),
            biased=self._biased(row, tokens),
            penalized=self._penalized(row, tokens),
        )

    def accept(self, token: int) -> None:
        """Take the token that was chosen of the scores that were planned for last."""
        if self.matcher is None or self.matcher.ended:
            return
        self.matcher.accept(token)
        self._n_accepted += 1
        if self.matcher.ended:
            self.ended_after = self._n_accepted

    def tell(self, logprob: TokenLogprob) -> None:
        """Keep the log-probability of the token that was chosen last."""
        assert self.logprobs is not None
        self.logprobs.put(logprob)
        self._n_told = self._n_output + 1

    def _catch_up(self, tokens: "TokensSoFar") -> None:
        """Stand where the tokens do: a step that failed has been undone, or another engine's."""
        if self.logprobs is not None and self._n_told > self._n_output:
            self.logprobs.take_back()
            self._n_told = self._n_output
        grammar = self._choosing.grammar
        if grammar is None:
            return
        if self._n_accepted > self._n_output:
            self.matcher, self._n_accepted, self.ended_after = grammar.matcher(), 0, None
        for token in tokens.since(self._n_prompt + self._n_accepted):
            self.accept(token)

    def _draw(self, row: int, position: int) -> Draw | None:
        sampling = self._choosing.sampling
        return None if sampling.greedy else Draw(row, sampling, position)

    def _biased(self, row: int, tokens: "TokensSoFar") -> Biased | None:
        bias = self._choosing.bias
        early = self._n_output < self._min_tokens
        if bias.neutral and not early:
            return None
        n_told = min(self._n_output, max(bias.longest_bad_word - 1, 0))
        changes = bias.changes(tokens.since(len(tokens) - n_told))
        return Biased(row, [*changes, *(self._too_early if early else ())], bias.allowed)

    def _penalized(self, row: int, tokens: "TokensSoFar") -> Penalized | None:
        if self._counts is None:
            return None
        self._counts.add(tokens.since(self._n_prompt + self._n_counted))
        self._n_counted = self._n_output
        return Penalized(row, self._choosing.penalties, self._counts)


def _counts(request: GenerationRequest) -> TokenCounts | None:
    penalties = request.choosing.penalties
    if penalties.neutral:
        return None
    seen = request.prompt_ids if penalties.repetition != 1 else ()
    return TokenCounts(seen, n_output=request.max_tokens)


@dataclass(frozen=True, slots=True)
class RowPlan:
    """What is to be done to one row of a batch's scores."""

    steps: Steps
    row: int
    draw: Draw | None
    biased: Biased | None
    penalized: Penalized | None

    @property
    def matcher(self) -> Matcher | None:
        """What holds the row's text to its grammar, while something may follow."""
        matcher = self.steps.matcher
        return None if matcher is None or matcher.ended else matcher


class TokensSoFar:
    """A request's tokens, prompt and output, as transformers keeps them, without a copy."""

    def __init__(self, state: Any) -> None:
        self._first: list[int] = state.initial_tokens
        self._then: list[int] = state.generated_tokens

    def __len__(self) -> int:
        return len(self._first) + len(self._then)

    def since(self, n_tokens: int) -> list[int]:
        """Return the tokens after the first so many."""
        n_first = len(self._first)
        if n_tokens >= n_first:
            return self._then[n_tokens - n_first :]
        return self._first[n_tokens:] + self._then
