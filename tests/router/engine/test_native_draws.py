"""Draws that are part of a native step: which batches they serve, and that they change no text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from faasmoe_kernels import KernelsUnavailable, load
from faasmoe_router.engine.batch_sampler import BatchSampler, LogitsState
from faasmoe_router.engine.generation import GenerationRequest, SamplingParams, StopConditions
from faasmoe_router.engine.sampler import (
    DrawParams,
    LogitBias,
    NativeDrawer,
    Penalties,
    RowDraw,
    sample_tokens,
)
from faasmoe_router.errors import GenerationFailed

PROMPT = (5, 6, 5)
N_VOCAB = 300
DRAWN = SamplingParams(draw=DrawParams(0.9, top_p=0.9, seed=3))
EDITED = [
    pytest.param(
        SamplingParams(draw=DrawParams(1.0), penalties=Penalties(presence=1.0)), id="penalties"
    ),
    pytest.param(SamplingParams(logit_bias=LogitBias(biases=((4, 1.0),))), id="bias"),
    pytest.param(SamplingParams(draw=DrawParams(1.0), n_logprobs=0), id="logprobs"),
]


@pytest.fixture(autouse=True)
def require_kernels() -> None:
    try:
        load()
    except KernelsUnavailable as error:
        pytest.skip(str(error))


def planned(*params: SamplingParams, reported: list[Any] | None = None) -> BatchSampler:
    """Return a sampler whose next scores have a row of each."""
    failed: list[Any] = [] if reported is None else reported
    sampler = BatchSampler(
        lambda ids, error: failed.append((list(ids), error)), draw_natively=NativeDrawer(load())
    )
    rows = []
    for row, params_of_row in enumerate(params):
        request = GenerationRequest(PROMPT, 20, params_of_row, StopConditions())
        state = LogitsState.for_request(request, [])
        if state is not None:
            rows.append((row, state, list(PROMPT), [1, 2]))
    sampler.plan_batch([str(row) for row in range(len(params))], rows)
    return sampler


def scores_of(n_rows: int) -> Tensor:
    return torch.randn(n_rows, N_VOCAB, generator=torch.Generator().manual_seed(1)) * 3


def test_a_batch_of_draws_and_greedy_rows_needs_no_edited_scores() -> None:
    draws = planned(DRAWN, SamplingParams(), DRAWN).draws()
    assert draws is not None
    assert [(d.row, d.top_p) for d in draws] == [(0, 0.9), (2, 0.9)]
    assert planned(SamplingParams()).draws() == []


@pytest.mark.parametrize("params", EDITED)
def test_a_batch_with_a_row_that_is_edited_is_sampled_as_a_whole(params: SamplingParams) -> None:
    assert planned(DRAWN, params).draws() is None


@pytest.mark.parametrize("params", EDITED)
def test_what_else_is_in_a_batch_changes_no_draw(params: SamplingParams) -> None:
    scores = scores_of(2)
    plan = [RowDraw(0, DRAWN.draw, len(PROMPT) + 2)]
    alone = NativeDrawer(load())(scores, plan)
    beside = planned(DRAWN, params).sample(scores.clone())
    assert beside[0].argmax() == alone[0]


def test_rows_without_a_finite_score_are_reported() -> None:
    reported: list[tuple[list[str], GenerationFailed]] = []
    planned(DRAWN, SamplingParams(), reported=reported).accept_drawn([1.0, float("nan")])
    assert [ids for ids, _ in reported] == [["1"]]


@pytest.mark.parametrize(
    "params",
    [
        DrawParams(1.0),
        DrawParams(0.7, top_p=0.8, top_k=10),
        DrawParams(1.0, min_p=0.02, top_p=0.9),
        DrawParams(1.5, top_k=500),
    ],
)
def test_the_library_draws_the_tokens_that_torch_draws(params: DrawParams) -> None:
    scores = scores_of(500)
    draws: Sequence[RowDraw] = [RowDraw(row, params, row) for row in range(500)]
    n_different = int((NativeDrawer(load())(scores, draws) != sample_tokens(scores, draws)).sum())
    assert n_different <= 1  # at a boundary between two tokens float32 rounds
