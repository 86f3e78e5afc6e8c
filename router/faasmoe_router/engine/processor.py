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

from faasmoe_router.engine.bias import add_biases
from faasmoe_router.engine.grammar import constrain
from faasmoe_router.engine.logprobs import log_probabilities
from faasmoe_router.engine.penalties import penalize
from faasmoe_router.engine.sampling import force_draws
from faasmoe_router.engine.steps import RowPlan, Steps, TokensSoFar
from faasmoe_router.errors import GenerationFailed, NoTokenAllowed

BrokenHandler = Callable[[Sequence[str], GenerationFailed], None]


class TokenChooser(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Chooses for the requests that have Steps. Runs on the engine's thread only.

    Args:
        on_broken: gets the ids of the requests that cannot go on, and why, before their tokens are
            delivered.
    """

    supported_kwargs: ClassVar[dict[str, type]] = {"steps": Steps}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, on_broken: BrokenHandler) -> None:
        self._on_broken = on_broken
        self._ids: list[str] = []
        self._plans: list[RowPlan] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Fill the argument row that transformers keeps for us; it carries nothing."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Note whose the rows of the coming scores are, and plan for those that have Steps."""
        self._ids = [request.state.request_id for request in requests_with_new_token]
        self._plans = []
        for row, request in enumerate(requests_with_new_token):
            steps = request.state.logit_processor_kwargs.get("steps")
            if steps is not None:
                self._plans.append(steps.plan(row, TokensSoFar(request.state)))
        return torch.zeros(len(requests_with_new_token), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Return scores whose argmax is each request's token, [N, V]."""
        self._report_not_finite(scores)
        if not self._plans:
            return scores
        told = [plan for plan in self._plans if plan.steps.logprobs is not None]
        own = scores[[plan.row for plan in told]] if told else None  # [L, V], a copy
        add_biases(scores, [plan.biased for plan in self._plans if plan.biased])
        penalize(scores, [plan.penalized for plan in self._plans if plan.penalized])
        held = [(plan.row, plan.matcher) for plan in self._plans if plan.matcher]
        constrain(scores, held)
        self._report_dead_ends(scores)
        force_draws(scores, [plan.draw for plan in self._plans if plan.draw])
        self._accept(scores)
        if own is not None:
            _tell(own, scores, told)
        return scores

    def _accept(self, scores: Tensor) -> None:
        """Let the grammars take the chosen tokens."""
        held = [plan for plan in self._plans if plan.matcher]
        if not held:
            return
        tokens = scores[[plan.row for plan in held]].argmax(-1).tolist()  # [G]
        for plan, token in zip(held, tokens, strict=True):
            plan.steps.accept(token)

    def _report_not_finite(self, scores: Tensor) -> None:
        peaks = scores[: len(self._ids)].amax(-1)  # [N]; NaN if any score is
        finite = peaks.isfinite().tolist()
        broken = [i for i, is_finite in zip(self._ids, finite, strict=True) if not is_finite]
        if broken:
            error = "the model's scores for this request are not finite"
            self._on_broken(broken, GenerationFailed(error))

    def _report_dead_ends(self, scores: Tensor) -> None:
        """Report the rows that have no token left."""
        narrowed = [plan for plan in self._plans if plan.matcher or plan.biased]
        if not narrowed:
            return
        finite = scores.amax(-1).isfinite().tolist()  # [N]
        for plan in narrowed:
            error = plan.matcher and plan.matcher.error
            if error or not finite[plan.row]:
                why = error or "the request's own constraints leave no token that may come next"
                self._on_broken([self._ids[plan.row]], NoTokenAllowed(why))


def _tell(own: Tensor, scores: Tensor, told: Sequence[RowPlan]) -> None:
    """Keep the log-probabilities of the chosen tokens; `own` are the model's scores, [L, V]."""
    chosen = scores[[plan.row for plan in told]].argmax(-1)  # [L]
    logs = [log for plan in told if (log := plan.steps.logprobs) is not None]
    entries = log_probabilities(own, chosen, [log.n_top for log in logs])
    for plan, entry in zip(told, entries, strict=True):
        plan.steps.tell(entry)
