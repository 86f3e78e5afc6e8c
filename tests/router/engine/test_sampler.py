import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from faasmoe_router.engine import sampler
from faasmoe_router.engine.sampler import DrawParams, RowDraw, force_sampled_tokens, sample_tokens


def _scores(n_rows: int, n_vocab: int = 50, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_rows, n_vocab, generator=generator) * 3


def _allowed_by_transformers(scores: Tensor, params: DrawParams) -> set[int]:
    scores = TemperatureLogitsWarper(params.temperature)(None, scores)
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(None, scores)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    return set(scores[0].isfinite().nonzero().flatten().tolist())


@pytest.mark.parametrize("candidates", [4, 1024])
@pytest.mark.parametrize(
    "params",
    [
        pytest.param(DrawParams(1.0, top_k=3), id="top_k"),
        pytest.param(DrawParams(1.0, top_p=0.3), id="small-top_p"),
        pytest.param(DrawParams(1.0, top_p=0.97), id="large-top_p"),
        pytest.param(DrawParams(0.7, top_p=0.8, top_k=10), id="both"),
        pytest.param(DrawParams(1.5, top_k=500), id="top_k-beyond-the-vocabulary"),
        pytest.param(DrawParams(2.0), id="neither"),
        pytest.param(DrawParams(1.0, min_p=0.02), id="min_p"),
        pytest.param(DrawParams(1.0, min_p=0.02, top_p=0.9), id="min_p-and-top_p"),
        pytest.param(DrawParams(1.0, min_p=0.05, top_k=5, top_p=0.9), id="all-three"),
    ],
)
def test_draws_from_the_same_tokens_as_transformers(
    params: DrawParams, candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "TOP_P_CANDIDATES", candidates)
    scores = _scores(1)
    draws = [RowDraw(0, params, position) for position in range(4000)]
    drawn = set(sample_tokens(scores.expand(len(draws), -1), draws).tolist())
    allowed = _allowed_by_transformers(scores, params)
    assert drawn <= allowed
    probs = (scores[0] / params.temperature).softmax(-1)
    likely = {token for token in allowed if probs[token] > 0.01}
    assert drawn >= likely


def test_draw_frequencies_match_probabilities() -> None:
    scores = torch.tensor([[0.5, 0.3, 0.2]]).log()
    draws = [RowDraw(0, DrawParams(1.0, seed=seed), 0) for seed in range(20000)]
    tokens = sample_tokens(scores.expand(len(draws), -1), draws)
    shares = tokens.bincount(minlength=3) / len(draws)
    assert torch.allclose(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.015)


@settings(deadline=None)
@given(
    others=st.lists(
        st.tuples(st.floats(0.1, 2), st.floats(0, 1), st.integers(0, 60)), min_size=1, max_size=5
    ),
    index=st.integers(0, 5),
)
def test_draw_is_independent_of_its_batch(
    others: list[tuple[float, float, int]], index: int
) -> None:
    draw_params = DrawParams(0.9, top_p=0.95, seed=3)
    alone = sample_tokens(_scores(1), [RowDraw(0, draw_params, 7)])
    params = [DrawParams(t, top_p=p, top_k=k, seed=1) for t, p, k in others]
    index = min(index, len(params))
    params.insert(index, draw_params)
    scores = _scores(len(params), seed=1)
    scores[index] = _scores(1)[0]
    batched = sample_tokens(scores, [RowDraw(row, p, 7) for row, p in enumerate(params)])
    assert batched[index] == alone[0]


def test_ties_are_drawn_independently_of_the_number_of_candidates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scores = torch.zeros(64, 40)
    draws = [RowDraw(row, DrawParams(1.0, top_p=0.4, seed=row), 0) for row in range(64)]
    expected = sample_tokens(scores, draws)
    monkeypatch.setattr(sampler, "TOP_P_CANDIDATES", 3)
    assert sample_tokens(scores, draws).equal(expected)


@pytest.mark.parametrize(
    "params",
    [
        pytest.param(DrawParams(1e-38), id="tiny-temperature"),
        pytest.param(DrawParams(1.0, top_p=0.0), id="top_p-0"),
    ],
)
def test_extreme_parameters_select_the_highest_score(params: DrawParams) -> None:
    scores = _scores(1)
    assert sample_tokens(scores, [RowDraw(0, params, 1)]).equal(scores.argmax(-1))


@pytest.mark.parametrize("temperature", [1e-320, 1e-46, 1e-45, 1e-30])
def test_temperature_below_float32_range_selects_the_highest_score(temperature: float) -> None:
    scores = _scores(1)
    draw = RowDraw(0, DrawParams(temperature), position=0)
    assert sample_tokens(scores.clone(), [draw]).item() == scores.argmax().item()


def test_rows_without_a_draw_are_unchanged() -> None:
    scores = _scores(3)
    expected = scores.clone()
    result = force_sampled_tokens(scores, [RowDraw(1, DrawParams(1.0), 0)])
    assert result[[0, 2]].equal(expected[[0, 2]])
    assert result[1].isinf().sum() == 1


def test_greedy_batch_is_returned_unchanged() -> None:
    scores = _scores(3)
    assert force_sampled_tokens(scores, []) is scores


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, 2**63 + 5])
def test_uniform_numbers_are_in_range_and_differ_by_position(seed: int) -> None:
    params = DrawParams(1.0, seed=seed)
    uniforms = {RowDraw(0, params, position).uniform for position in range(1000)}
    assert len(uniforms) == 1000
    assert all(0 <= uniform < 1 for uniform in uniforms)
