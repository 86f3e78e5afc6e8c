"""Samples the next token of every request of a batch, and keeps each request's sampling state.

`BatchSampler` implements the adapter's protocol: rows whose requests have a LogitsState are edited
so that the argmax of the row is the sampled token. In this order: biases and forbidden tokens,
penalties, grammars, and the draw, each applied to the rows that asked for it. Greedy rows are left
untouched, so a greedy batch costs one reduction per row. Where a step is one native call, rows that
are only drawn from, or greedy, are part of it (`draws`). Rows without a finite maximum have no
meaningful token; their requests are reported instead.

`LogitsState` travels with its request through the batching backend, so nothing has to be freed when
a request ends. A preempted request returns with part of its output moved into its prompt; positions
count from the original prompt, so they do not change. Every step synchronizes the state with the
tokens that the request actually has, which covers steps that are recomputed after a failure and
requests resumed from another batcher.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from faasmoe_kernels.router_ops import Draw
from faasmoe_router.engine.generation import GenerationRequest, SamplingParams
from faasmoe_router.engine.grammar_state import GrammarState
from faasmoe_router.engine.sampler import (
    FORBIDDEN,
    FORCED,
    LogprobQueue,
    NativeDrawer,
    RowBias,
    RowDraw,
    RowPenalties,
    SampledLogprob,
    TokenCounts,
    apply_logit_bias,
    apply_penalties,
    compute_logprobs,
    force_sampled_tokens,
)
from faasmoe_router.engine.structured_output import RowConstraint, apply_grammar_bitmask
from faasmoe_router.errors import GenerationFailed, NoTokenAllowed
from faasmoe_transformers.continuous_batching import SamplerRow


class LogitsState:
    """Logits-processing state of one request. Planned and updated on the engine's thread only.

    Args:
        request: the request.
        stop_token_ids: tokens that end the text; forbidden before `min_tokens`.

    Attributes:
        grammar_state: position in the grammar; None if the request has none.
        logprob_queue: log-probabilities computed and not yet delivered; None if not requested.
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
        self._n_recorded = -request.n_forced  # outputs count from the end of the prompt
        self._prompt_token_ids = request.prompt_token_ids if request.scores_prompt else ()
        self.grammar_state = _new_grammar_state(params)
        self.logprob_queue = _new_logprob_queue(params)

    @property
    def n_tokens_at_grammar_end(self) -> int | None:
        """Number of output tokens at which the grammar allows no further one; None until then."""
        return None if self.grammar_state is None else self.grammar_state.n_tokens_at_end

    @classmethod
    def for_request(
        cls, request: GenerationRequest, stop_token_ids: Collection[int]
    ) -> Self | None:
        """Return the state of a request; None if its tokens are the argmax of raw scores."""
        is_plain = request.sampling_params.is_plain_greedy and not request.scores_prompt
        if is_plain and request.stop_conditions.min_tokens == 0:
            return None
        return cls(request, stop_token_ids)

    def __deepcopy__(self, memo: Mapping[int, Any]) -> Self:
        """Return itself: transformers copies a request's arguments when it preempts it."""
        return self

    def plan_row(self, row: int, tokens: TokenHistory) -> RowPlan:
        """Return what to apply to the scores of the next token.

        Args:
            row: the request's row in the batch's scores.
            tokens: the request's tokens so far.
        """
        self._n_output = len(tokens) - self._n_prompt
        self._sync_to_tokens(tokens)
        if self._n_output < 0:
            forced = RowBias(row, [(self._prompt_token_ids[len(tokens)], FORCED)])
            return RowPlan(self, row, draw=None, bias=forced, penalties=None, is_forced=True)
        return RowPlan(
            logits_state=self,
            row=row,
            draw=self._plan_draw(row, len(tokens)),
            bias=self._plan_bias(row, tokens),
            penalties=self._plan_penalties(row, tokens),
        )

    def accept_token(self, token: int) -> None:
        """Advance the grammar by the next output token; ignored once the grammar has ended."""
        if self.grammar_state is not None:
            self.grammar_state.accept_token(token)

    def record_logprob(self, logprob: SampledLogprob) -> None:
        """Queue the log-probability of the token sampled from the last planned row."""
        assert self.logprob_queue is not None
        self.logprob_queue.append(logprob)
        self._n_recorded = self._n_output + 1

    def _sync_to_tokens(self, tokens: TokenHistory) -> None:
        """Match queue and grammar to the tokens, after a failed step or in a resumed request."""
        if self.logprob_queue is not None and self._n_recorded > self._n_output:
            self.logprob_queue.discard_last()
            self._n_recorded = self._n_output
        if self.grammar_state is None:
            return
        if self.grammar_state.n_accepted > self._n_output:
            self.grammar_state = _new_grammar_state(self._params)
        assert self.grammar_state is not None
        for token in tokens.after(self._n_prompt + self.grammar_state.n_accepted):
            self.accept_token(token)

    def _plan_draw(self, row: int, position: int) -> RowDraw | None:
        draw_params = self._params.draw
        return None if draw_params.is_greedy else RowDraw(row, draw_params, position)

    def _plan_bias(self, row: int, tokens: TokenHistory) -> RowBias | None:
        bias = self._params.logit_bias
        forbids_stop = self._n_output < self._min_tokens
        if bias.is_neutral and not forbids_stop:
            return None
        n_tail = min(self._n_output, max(bias.max_bad_word_length - 1, 0))
        adjustments = bias.adjustments(tokens.after(len(tokens) - n_tail))
        if forbids_stop:
            adjustments += self._min_tokens_adjustments
        return RowBias(row, adjustments, bias.allowed_token_ids)

    def _plan_penalties(self, row: int, tokens: TokenHistory) -> RowPenalties | None:
        if self._token_counts is None:
            return None
        self._token_counts.add_tokens(tokens.after(self._n_prompt + self._n_counted))
        self._n_counted = self._n_output
        return RowPenalties(row, self._params.penalties, self._token_counts)


def _new_grammar_state(params: SamplingParams) -> GrammarState | None:
    if params.grammar is None:
        return None
    return GrammarState(params.grammar.new_matcher(), params.reasoning)


def _new_logprob_queue(params: SamplingParams) -> LogprobQueue | None:
    if params.n_logprobs is None:
        return None
    return LogprobQueue(params.n_logprobs, params.logprob_token_ids)


def _new_token_counts(request: GenerationRequest) -> TokenCounts | None:
    penalties = request.sampling_params.penalties
    if penalties.is_neutral:
        return None
    prompt_token_ids = request.prompt_token_ids if penalties.repetition != 1 else ()
    return TokenCounts(prompt_token_ids, max_output_tokens=request.max_tokens)


@dataclass(frozen=True, slots=True)
class RowPlan:
    """What to apply to one row of a batch's scores; a forced row's token is the prompt's next."""

    logits_state: LogitsState
    row: int
    draw: RowDraw | None
    bias: RowBias | None
    penalties: RowPenalties | None
    is_forced: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether the token is chosen by the scores as they are, and nothing else is kept of it."""
        is_edited = self.bias is not None or self.penalties is not None
        return not is_edited and not self.grammar_state and self.logits_state.logprob_queue is None

    @property
    def grammar_state(self) -> GrammarState | None:
        """The position in the grammar that follows the row's token; None without, or at its end."""
        state = self.logits_state.grammar_state
        return None if self.is_forced or state is None or state.is_terminated else state

    @property
    def constraint(self) -> RowConstraint | None:
        """What constrains the row's next token; None if nothing does."""
        state = self.grammar_state
        if state is None or state.is_reasoning:
            return None
        return RowConstraint(self.row, state.matcher, state.free_token)


class TokenHistory:
    """A request's tokens, prompt and output, read from the backend's lists without a copy.

    Args:
        initial_tokens: the prompt as submitted to the batch; after a preemption it includes the
            output so far.
        generated_tokens: tokens generated since.
    """

    def __init__(self, initial_tokens: list[int], generated_tokens: list[int]) -> None:
        self._initial_tokens = initial_tokens
        self._generated_tokens = generated_tokens

    def __len__(self) -> int:
        return len(self._initial_tokens) + len(self._generated_tokens)

    def after(self, n_tokens: int) -> list[int]:
        """Return the tokens after the first `n_tokens`."""
        n_initial = len(self._initial_tokens)
        if n_tokens >= n_initial:
            return self._generated_tokens[n_tokens - n_initial :]
        return self._initial_tokens[n_tokens:] + self._generated_tokens


RequestErrorHandler = Callable[[Sequence[str], GenerationFailed], None]
"""Receives the ids of requests that cannot continue, and why."""


class BatchSampler:
    """Samples for the requests that have a LogitsState. Used on the batcher's thread only.

    Args:
        on_request_error: receives the requests that cannot continue, before their tokens are
            delivered.
        check_weights: called before each batch's tokens are taken; raises if weights changed while
            they were computed.
        draw_natively: draws tokens on a CPU; None to have torch draw them.
    """

    request_state_type: type = LogitsState

    def __init__(
        self,
        on_request_error: RequestErrorHandler,
        *,
        check_weights: Callable[[], None] = lambda: None,
        draw_natively: NativeDrawer | None = None,
    ) -> None:
        self._check_weights = check_weights
        self._draw_natively = draw_natively
        self._on_request_error = on_request_error
        self._request_ids: list[str] = []
        self._row_plans: list[RowPlan] = []

    def plan_batch(self, request_ids: list[str], rows: Sequence[SamplerRow]) -> None:
        """Plan the rows of the next scores.

        Args:
            request_ids: the requests by row.
            rows: the rows whose requests have a LogitsState.
        """
        self._request_ids = request_ids
        self._row_plans = [
            logits_state.plan_row(row, TokenHistory(initial_tokens, generated_tokens))
            for row, logits_state, initial_tokens, generated_tokens in rows
        ]

    def draws(self) -> Sequence[Draw] | None:
        """Return what is drawn from the model's own scores; None if some are edited first."""
        if not all(plan.is_plain for plan in self._row_plans):
            return None
        return [plan.draw.native() for plan in self._row_plans if plan.draw]

    def accept_drawn(self, peaks: Sequence[float]) -> None:
        """Report the rows of tokens chosen as `draws` tells that have no meaningful one.

        Args:
            peaks: the highest score of each row; NaN if one is.
        """
        self._check_weights()
        self._report_non_finite([math.isfinite(peak) for peak in peaks])

    def sample(self, scores: Tensor) -> Tensor:
        """Return scores whose argmax is each request's token, [N, V]; edits them in place."""
        self._check_weights()
        peaks = scores[: len(self._request_ids)].amax(-1)  # [N]; NaN if any score is
        self._report_non_finite(peaks.isfinite().tolist())
        if not self._row_plans:
            return scores
        with_logprobs = [
            plan for plan in self._row_plans if plan.logits_state.logprob_queue is not None
        ]
        model_scores = (
            scores[[plan.row for plan in with_logprobs]] if with_logprobs else None
        )  # [L, V], a copy
        apply_logit_bias(scores, [plan.bias for plan in self._row_plans if plan.bias])
        apply_penalties(scores, [plan.penalties for plan in self._row_plans if plan.penalties])
        apply_grammar_bitmask(scores, [c for plan in self._row_plans if (c := plan.constraint)])
        self._report_no_token_allowed(scores)
        draws = [plan.draw for plan in self._row_plans if plan.draw]
        force_sampled_tokens(scores, draws, self._draw_natively)
        self._accept_tokens(scores)
        if model_scores is not None:
            _record_logprobs(model_scores, scores, with_logprobs)
        return scores

    def _accept_tokens(self, scores: Tensor) -> None:
        """Advance the grammars by the sampled tokens."""
        constrained = [plan for plan in self._row_plans if plan.grammar_state]
        if not constrained:
            return
        tokens = scores[[plan.row for plan in constrained]].argmax(-1).tolist()  # [G]
        for plan, token in zip(constrained, tokens, strict=True):
            plan.logits_state.accept_token(token)

    def _report_non_finite(self, finite: Sequence[bool]) -> None:
        """Report the requests whose highest score is not finite."""
        failed_ids = [
            i for i, is_finite in zip(self._request_ids, finite, strict=True) if not is_finite
        ]
        if failed_ids:
            error = "the model's scores for this request are not finite"
            self._on_request_error(failed_ids, GenerationFailed(error))

    def _report_no_token_allowed(self, scores: Tensor) -> None:
        """Report the rows that have no token left."""
        constrained = [
            plan
            for plan in self._row_plans
            if (plan.constraint or plan.bias) and not plan.is_forced
        ]
        if not constrained:
            return
        finite = scores.amax(-1).isfinite().tolist()  # [N]
        for plan in constrained:
            constraint = plan.constraint
            error = constraint and constraint.matcher.error
            if error or not finite[plan.row]:
                reason = error or "the request's own constraints leave no token that may come next"
                self._on_request_error([self._request_ids[plan.row]], NoTokenAllowed(reason))


def _record_logprobs(model_scores: Tensor, scores: Tensor, plans: Sequence[RowPlan]) -> None:
    """Record the log-probabilities of the sampled tokens.

    Args:
        model_scores: the model's own scores, [L, V].
        scores: scores whose argmax is the sampled token, [N, V].
        plans: the L rows that asked for log-probabilities.
    """
    chosen = scores[[plan.row for plan in plans]].argmax(-1)  # [L]
    queues = [log for plan in plans if (log := plan.logits_state.logprob_queue) is not None]
    token_ids = [log.token_ids for log in queues]
    entries = compute_logprobs(model_scores, chosen, [log.n_top for log in queues], token_ids)
    for plan, entry in zip(plans, entries, strict=True):
        plan.logits_state.record_logprob(entry)
