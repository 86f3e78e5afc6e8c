"""What is done to one request's scores at each token, and what is kept from one to the next.

It travels with the request through transformers' batching, so nothing has to be freed. A preempted
request comes back with part of its output in its prompt; what is kept here counts from the prompt
that was asked for, and is the same object before and after. A step that is computed again, and the
first step of a request that another engine began, find their state by the tokens that there are.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self

from faasmoe_router.engine.generation import GenerationRequest
from faasmoe_router.engine.sampler import (
    FORBIDDEN,
    LogprobQueue,
    RowBias,
    RowDraw,
    RowPenalties,
    SampledLogprob,
    TokenCounts,
)
from faasmoe_router.engine.structured_output import GrammarMatcher


class LogitsState:
    """One request's steps.

    Attributes:
        logprobs: the log-probabilities that were found and not taken yet.
        ended_after: how many tokens the text has when its grammar lets nothing follow them.
    """

    def __init__(self, request: GenerationRequest, stop_token_ids: Collection[int]) -> None:
        params = request.sampling_params
        self._params = params
        self._n_prompt = len(request.prompt_token_ids)
        self._n_output = 0
        self._min_tokens = request.stop_conditions.min_tokens
        if params.grammar is not None:
            stop_token_ids = {*stop_token_ids, *params.grammar.stop_token_ids}
        self._min_tokens_adjustments = [(token, FORBIDDEN) for token in stop_token_ids]
        self._token_counts = _new_token_counts(request)
        self._n_counted = 0
        self._n_accepted = 0
        self._n_recorded = 0
        self.matcher = None if params.grammar is None else params.grammar.new_matcher()
        self.logprob_queue = None if params.n_logprobs is None else LogprobQueue(params.n_logprobs)
        self.n_tokens_at_grammar_end: int | None = None

    @classmethod
    def for_request(
        cls, request: GenerationRequest, stop_token_ids: Collection[int]
    ) -> Self | None:
        """Return the steps of a request that ends with these tokens; None if it needs none."""
        if request.sampling_params.is_plain_greedy and request.stop_conditions.min_tokens == 0:
            return None
        return cls(request, stop_token_ids)

    def __deepcopy__(self, memo: Mapping[int, Any]) -> Self:
        """Return itself: transformers copies a request's settings when it preempts it."""
        return self

    def plan_row(self, row: int, tokens: "TokenHistory") -> "RowPlan":
        """Return what is to be done to the scores of the next token, which are a batch's row."""
        self._n_output = len(tokens) - self._n_prompt
        self._sync_to_tokens(tokens)
        return RowPlan(
            logits_state=self,
            row=row,
            draw=self._plan_draw(row, len(tokens)),
            bias=self._plan_bias(row, tokens),
            penalties=self._plan_penalties(row, tokens),
        )

    def accept_token(self, token: int) -> None:
        """Take the token that was chosen of the scores that were planned for last."""
        if self.matcher is None or self.matcher.is_terminated:
            return
        self.matcher.accept_token(token)
        self._n_accepted += 1
        if self.matcher.is_terminated:
            self.n_tokens_at_grammar_end = self._n_accepted

    def record_logprob(self, logprob: SampledLogprob) -> None:
        """Keep the log-probability of the token that was chosen last."""
        assert self.logprob_queue is not None
        self.logprob_queue.append(logprob)
        self._n_recorded = self._n_output + 1

    def _sync_to_tokens(self, tokens: "TokenHistory") -> None:
        """Stand where the tokens do: a step that failed has been undone, or another engine's."""
        if self.logprob_queue is not None and self._n_recorded > self._n_output:
            self.logprob_queue.discard_last()
            self._n_recorded = self._n_output
        grammar = self._params.grammar
        if grammar is None:
            return
        if self._n_accepted > self._n_output:
            self.matcher, self._n_accepted, self.n_tokens_at_grammar_end = (
                grammar.new_matcher(),
                0,
                None,
            )
        for token in tokens.after(self._n_prompt + self._n_accepted):
            self.accept_token(token)

    def _plan_draw(self, row: int, position: int) -> RowDraw | None:
        draw_params = self._params.draw
        return None if draw_params.is_greedy else RowDraw(row, draw_params, position)

    def _plan_bias(self, row: int, tokens: "TokenHistory") -> RowBias | None:
        bias = self._params.logit_bias
        is_too_early = self._n_output < self._min_tokens
        if bias.is_neutral and not is_too_early:
            return None
        n_tail = min(self._n_output, max(bias.max_bad_word_length - 1, 0))
        adjustments = bias.adjustments(tokens.after(len(tokens) - n_tail))
        return RowBias(
            row,
            [*adjustments, *(self._min_tokens_adjustments if is_too_early else ())],
            bias.allowed_token_ids,
        )

    def _plan_penalties(self, row: int, tokens: "TokenHistory") -> RowPenalties | None:
        if self._token_counts is None:
            return None
        self._token_counts.add_tokens(tokens.after(self._n_prompt + self._n_counted))
        self._n_counted = self._n_output
        return RowPenalties(row, self._params.penalties, self._token_counts)


def _new_token_counts(request: GenerationRequest) -> TokenCounts | None:
    penalties = request.sampling_params.penalties
    if penalties.is_neutral:
        return None
    prompt_token_ids = request.prompt_token_ids if penalties.repetition != 1 else ()
    return TokenCounts(prompt_token_ids, max_output_tokens=request.max_tokens)


@dataclass(frozen=True, slots=True)
class RowPlan:
    """What is to be done to one row of a batch's scores."""

    logits_state: LogitsState
    row: int
    draw: RowDraw | None
    bias: RowBias | None
    penalties: RowPenalties | None

    @property
    def matcher(self) -> GrammarMatcher | None:
        """What holds the row's text to its grammar, while something may follow."""
        matcher = self.logits_state.matcher
        return None if matcher is None or matcher.is_terminated else matcher


class TokenHistory:
    """A request's tokens, prompt and output, as transformers keeps them, without a copy."""

    def __init__(self, state: Any) -> None:
        self._initial_tokens: list[int] = state.initial_tokens
        self._generated_tokens: list[int] = state.generated_tokens

    def __len__(self) -> int:
        return len(self._initial_tokens) + len(self._generated_tokens)

    def after(self, n_tokens: int) -> list[int]:
        """Return the tokens after the first so many."""
        n_initial = len(self._initial_tokens)
        if n_tokens >= n_initial:
            return self._generated_tokens[n_tokens - n_initial :]
        return self._initial_tokens[n_tokens:] + self._generated_tokens
