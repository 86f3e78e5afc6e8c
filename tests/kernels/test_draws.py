"""Tokens drawn by the kernel library, compared with a plain reference."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from faasmoe_kernels import KernelError, load
from faasmoe_kernels.router_ops import Draw, TokenDrawer

Floats = npt.NDArray[np.float32]
N_ROWS = 200


def drawn(scores: Floats, draws: Sequence[Draw], *, n_threads: int = 1) -> list[int]:
    tokens = np.full(len(scores), -1, dtype=np.int32)
    TokenDrawer(load())(
        *(scores.ctypes.data, *scores.shape, draws),
        tokens=tokens.ctypes.data,
        n_threads=n_threads,
    )
    return [int(token) for token in tokens]


def scores_of(n_vocab: int, n_rows: int = N_ROWS) -> Floats:
    return (np.random.default_rng(n_vocab).standard_normal((n_rows, n_vocab)) * 3).astype("f4")


def reference(scores: Floats, draw: Draw) -> int:
    """Draw as described by `fk_draw`, in float64."""
    exact = scores.astype(float)
    likelihoods = np.exp((exact - exact.max()) / draw.temperature)
    order = np.argsort(-likelihoods, kind="stable")
    is_kept = likelihoods >= draw.min_p
    if draw.top_k:
        is_kept &= likelihoods >= likelihoods[order[min(draw.top_k, len(order)) - 1]]
    kept = np.where(is_kept, likelihoods, 0)
    before = np.cumsum(kept[order]) - kept[order]
    n_within = int((before < draw.top_p * kept.sum()).sum())
    kept[order[max(1, n_within) :]] = 0
    sums = np.cumsum(kept)
    return int(np.searchsorted(sums, draw.uniform * sums[-1], side="right"))


@pytest.mark.parametrize("n_vocab", [1, 7, 50, 1024, 5000])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, 0, 1.0, 0.0),
        (0.3, 0, 1.0, 0.0),
        (1.0, 5, 1.0, 0.0),
        (1.0, 0, 0.9, 0.0),
        (5.0, 0, 0.99, 0.0),  # more tokens than are sorted at first
        (1.0, 0, 1.0, 0.05),
        (1.0, 40, 0.8, 0.01),
        (1.0, 10**9, 0.0, 0.0),
    ],
)
def test_draws_what_the_reference_draws(
    n_vocab: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    scores = scores_of(n_vocab)
    uniforms = np.random.default_rng(1).random(N_ROWS)
    draws = [Draw(row, top_k, top_p, min_p, u, temperature) for row, u in enumerate(uniforms)]
    expected = [reference(scores[d.row], d) for d in draws]
    tokens = drawn(scores, draws)
    n_different = sum(a != b for a, b in zip(tokens, expected, strict=True))
    assert n_different <= 1  # at a boundary between two tokens float32 rounds


def test_a_draw_depends_on_no_other_row_and_no_thread() -> None:
    scores = scores_of(3000, n_rows=40)
    draws = [Draw(row, 0, 0.95, 0.0, row / 40, 1.0) for row in range(40)]
    together = drawn(scores, draws, n_threads=2)
    assert together == [drawn(scores[d.row : d.row + 1], [at_first_row(d)])[0] for d in draws]


def at_first_row(draw: Draw) -> Draw:
    return Draw(0, draw.top_k, draw.top_p, draw.min_p, draw.uniform, draw.temperature)


def test_forbidden_tokens_are_never_drawn() -> None:
    scores = np.full((1, 2000), -np.inf, dtype="f4")
    scores[0, [3, 1999]] = 1.0
    uniforms = (0.0, 0.49, 0.51, np.nextafter(1.0, 0.0))
    assert [drawn(scores, [Draw(0, 0, 1.0, 0.0, u, 1.0)])[0] for u in uniforms] == [
        *(3, 3, 1999, 1999)
    ]


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1e-30])
def test_tiny_temperatures_select_the_highest_score(temperature: float) -> None:
    scores = scores_of(500)
    draws = [Draw(row, 0, 1.0, 0.0, 0.999, temperature) for row in range(N_ROWS)]
    assert drawn(scores, draws) == scores.argmax(-1).tolist()


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_a_row_without_a_finite_highest_score_gets_some_token(score: float) -> None:
    scores = np.full((1, 30), score, dtype="f4")
    assert 0 <= drawn(scores, [Draw(0, 3, 0.5, 0.1, 0.5, 1.0)])[0] < 30


def test_rows_without_a_draw_keep_their_tokens() -> None:
    assert drawn(scores_of(9, n_rows=3), [Draw(1, 1, 1.0, 0.0, 0.5, 1.0)])[::2] == [-1, -1]


@pytest.mark.parametrize(
    "draw",
    [
        Draw(1, 0, 1.0, 0.0, 0.5, 1.0),
        Draw(-1, 0, 1.0, 0.0, 0.5, 1.0),
        Draw(0, 0, 1.0, 0.0, 1.0, 1.0),
        Draw(0, 0, float("nan"), 0.0, 0.5, 1.0),
        Draw(0, -1, 1.0, 0.0, 0.5, 1.0),
        Draw(0, 0, 1.0, 0.0, 0.5, -1.0),
    ],
)
def test_refuses_draws_that_cannot_be(draw: Draw) -> None:
    with pytest.raises(KernelError, match="draw"):
        drawn(scores_of(9, n_rows=1), [draw])
