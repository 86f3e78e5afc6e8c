"""The one logits processor of the engine: each request's own way of choosing tokens.

transformers' continuous batching samples with one setting for all. Here every request that wants
more than the highest score brings its Steps, and the engine's argmax takes what they chose. For
each batch, in this order: biases and forbidden tokens, penalties, grammars, and the draw; each of
them over the rows that asked for it. Rows that are greedy are untouched, so a greedy batch costs
one look at each row's peak: scores that are not finite have no token that means anything, and their
requests are told of instead.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
)

from faasmoe_router.engine.logits_state import LogitsState, RowPlan, TokenHistory
from faasmoe_router.engine.sampler import (
    apply_logit_bias,
    apply_penalties,
    compute_logprobs,
    force_sampled_tokens,
)
from faasmoe_router.engine.structured_output import apply_grammar_bitmask
from faasmoe_router.errors import GenerationFailed, NoTokenAllowed

RequestErrorHandler = Callable[[Sequence[str], GenerationFailed], None]


class BatchLogitsProcessor(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Chooses for the requests that have Steps. Runs on the engine's thread only.

    Args:
        on_broken: gets the ids of the requests that cannot go on, and why, before their tokens are
            delivered.
    """

    supported_kwargs: ClassVar[dict[str, type]] = {"logits_state": LogitsState}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, on_request_error: RequestErrorHandler) -> None:
        self._on_request_error = on_request_error
        self._request_ids: list[str] = []
        self._row_plans: list[RowPlan] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Fill the argument row that transformers keeps for us; it carries nothing."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Note whose the rows of the coming scores are, and plan for those that have Steps."""
        self._request_ids = [request.state.request_id for request in requests_with_new_token]
        self._row_plans = []
        for row, request in enumerate(requests_with_new_token):
            logits_state = request.state.logit_processor_kwargs.get("logits_state")
            if logits_state is not None:
                self._row_plans.append(logits_state.plan_row(row, TokenHistory(request.state)))
        return torch.zeros(len(requests_with_new_token), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Return scores whose argmax is each request's token, [N, V]."""
        self._report_non_finite(scores)
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
        constrained = [(plan.row, plan.matcher) for plan in self._row_plans if plan.matcher]
        apply_grammar_bitmask(scores, constrained)
        self._report_no_token_allowed(scores)
        force_sampled_tokens(scores, [plan.draw for plan in self._row_plans if plan.draw])
        self._accept_tokens(scores)
        if model_scores is not None:
            _record_logprobs(model_scores, scores, with_logprobs)
        return scores

    def _accept_tokens(self, scores: Tensor) -> None:
        """Let the grammars take the chosen tokens."""
        constrained = [plan for plan in self._row_plans if plan.matcher]
        if not constrained:
            return
        tokens = scores[[plan.row for plan in constrained]].argmax(-1).tolist()  # [G]
        for plan, token in zip(constrained, tokens, strict=True):
            plan.logits_state.accept_token(token)

    def _report_non_finite(self, scores: Tensor) -> None:
        peaks = scores[: len(self._request_ids)].amax(-1)  # [N]; NaN if any score is
        finite = peaks.isfinite().tolist()
        failed_ids = [
            i for i, is_finite in zip(self._request_ids, finite, strict=True) if not is_finite
        ]
        if failed_ids:
            error = "the model's scores for this request are not finite"
            self._on_request_error(failed_ids, GenerationFailed(error))

    def _report_no_token_allowed(self, scores: Tensor) -> None:
        """Report the rows that have no token left."""
        constrained = [plan for plan in self._row_plans if plan.matcher or plan.bias]
        if not constrained:
            return
        finite = scores.amax(-1).isfinite().tolist()  # [N]
        for plan in constrained:
            error = plan.matcher and plan.matcher.error
            if error or not finite[plan.row]:
                reason = error or "the request's own constraints leave no token that may come next"
                self._on_request_error([self._request_ids[plan.row]], NoTokenAllowed(reason))


def _record_logprobs(model_scores: Tensor, scores: Tensor, plans: Sequence[RowPlan]) -> None:
    """Keep the log-probabilities of the chosen tokens; `own` are the model's scores, [L, V]."""
    chosen = scores[[plan.row for plan in plans]].argmax(-1)  # [L]
    queues = [log for plan in plans if (log := plan.logits_state.logprob_queue) is not None]
    entries = compute_logprobs(model_scores, chosen, [log.n_top for log in queues])
    for plan, entry in zip(plans, entries, strict=True):
        plan.logits_state.record_logprob(entry)
