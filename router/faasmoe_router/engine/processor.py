"""The one logits processor of the engine: each request's own way of choosing tokens.

transformers' continuous batching samples with one setting for all. Here every request brings its
SamplingParams; the engine's argmax then takes what was drawn. Rows that are greedy are untouched,
so a greedy batch costs one look at each row's peak: scores that are not finite have no token that
means anything, and their requests are told of instead. Whatever else changes scores (penalties,
biases, grammars) belongs in `__call__` ahead of the draw, and what it needs from a request in
`prepare_tensor_args`.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
)

from faasmoe_router.engine.sampling import Draw, SamplingParams, force_draws

GREEDY = SamplingParams()


class RequestSampler(ContinuousBatchingLogitsProcessor):  # type: ignore[misc]
    """Draws for the requests that sample. Runs on the engine's thread only, batch after batch.

    Args:
        on_broken: gets the ids of the requests whose scores are not finite, before their tokens
            are delivered.
    """

    supported_kwargs: ClassVar[dict[str, type]] = {"sampling": SamplingParams}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, on_broken: Callable[[Sequence[str]], None]) -> None:
        self._on_broken = on_broken
        self._ids: list[str] = []
        self._draws: list[Draw] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Fill the argument row that transformers keeps for us; it carries nothing."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Note whose the rows of the coming scores are, and which are to be drawn."""
        self._ids = [request.state.request_id for request in requests_with_new_token]
        self._draws = []
        for row, request in enumerate(requests_with_new_token):
            state = request.state
            params = state.logit_processor_kwargs.get("sampling", GREEDY)
            if not params.greedy:
                # Together, for a preempted request has part of its output in its prompt.
                position = len(state.initial_tokens) + len(state.generated_tokens)
                self._draws.append(Draw(row, params, position))
        return torch.zeros(len(requests_with_new_token), dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Return scores whose argmax is each request's token, [N, V]."""
        self._report_broken(scores)
        return force_draws(scores, self._draws)

    def _report_broken(self, scores: Tensor) -> None:
        peaks = scores[: len(self._ids)].amax(-1)  # [N]; NaN if any score is
        finite = peaks.isfinite().tolist()
        broken = [i for i, is_finite in zip(self._ids, finite, strict=True) if not is_finite]
        if broken:
            self._on_broken(broken)
