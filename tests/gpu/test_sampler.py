"""Sampling on the device gives the same results as on the host."""

from typing import cast

import pytest
import torch
from torch import Tensor

from faasmoe_router.engine.sampler import (
    FORBIDDEN,
    DrawParams,
    Penalties,
    RowBias,
    RowDraw,
    RowPenalties,
    TokenCounts,
    apply_logit_bias,
    apply_penalties,
    compute_logprobs,
    force_sampled_tokens,
    sample_tokens,
)
from faasmoe_router.engine.structured_output import (
    GrammarMatcher,
    RowConstraint,
    apply_grammar_bitmask,
)

N_ROWS, N_VOCAB = 6, 3000
PARAMS = [
    DrawParams(temperature=1.0, seed=1),
    DrawParams(temperature=0.7, top_p=0.8, seed=2),
    DrawParams(temperature=1.3, top_k=20, seed=3),
    DrawParams(temperature=1.0, min_p=0.05, seed=4),
    DrawParams(temperature=5.0, top_p=0.999, top_k=2000, seed=5),
    DrawParams(temperature=1e-9, seed=6),
]


@pytest.fixture
def scores() -> Tensor:
    return torch.randn(N_ROWS, N_VOCAB, generator=torch.Generator().manual_seed(0)) * 4


def test_sampled_tokens_equal_those_of_the_host(scores: Tensor, cuda: torch.device) -> None:
    for position in range(20):
        draws = [RowDraw(row, params, position) for row, params in enumerate(PARAMS)]
        expected = sample_tokens(scores, draws)
        assert torch.equal(sample_tokens(scores.to(cuda), draws).cpu(), expected)
        forced = force_sampled_tokens(scores.to(cuda), draws)
        assert torch.equal(forced.argmax(-1).cpu(), expected)


def test_biases_and_penalties_equal_those_of_the_host(scores: Tensor, cuda: torch.device) -> None:
    counts = TokenCounts([5, 9, 2], max_output_tokens=8)
    counts.add_tokens([9, 9, 100])
    penalized = [
        RowPenalties(1, Penalties(0.5, 0.25, 1.2), counts),
        RowPenalties(4, Penalties(), counts),
    ]
    biased = [
        RowBias(0, [(7, 3.0), (8, FORBIDDEN), (7, 1.0)]),
        RowBias(3, [(11, 2.0)], allowed_token_ids=(11, 12, 13)),
    ]
    there = scores.to(cuda)
    for each in (scores, there):
        apply_logit_bias(each, biased)
        apply_penalties(each, penalized)
    torch.testing.assert_close(there.cpu(), scores)
    assert there.isneginf().sum().item() == 1 + N_VOCAB - 3


def test_log_probabilities_equal_those_of_the_host(scores: Tensor, cuda: torch.device) -> None:
    chosen = scores.argmax(-1)
    wanted = [0, 3, 20, 1, 0, 5]
    expected = compute_logprobs(scores, chosen, wanted)
    found = compute_logprobs(scores.to(cuda), chosen.to(cuda), wanted)
    for here, there in zip(expected, found, strict=True):
        assert (there.token, [t for t, _ in there.top_logprobs]) == (
            here.token,
            [t for t, _ in here.top_logprobs],
        )
        assert there.logprob == pytest.approx(here.logprob, abs=1e-4)


class EveryThirdTokenMatcher:
    """A grammar that allows every third token."""

    n_bitmask_words = -(-N_VOCAB // 32)

    def fill_bitmask(self, bitmask: Tensor) -> None:
        bits = (torch.arange(self.n_bitmask_words * 32) % 3 == 0).view(-1, 32)  # [W, 32]
        bitmask.copy_((bits.long() << torch.arange(32)).sum(1).to(torch.int32))


def test_grammar_masks_equal_those_of_the_host(scores: Tensor, cuda: torch.device) -> None:
    matcher = cast(GrammarMatcher, EveryThirdTokenMatcher())
    there = scores.to(cuda)
    for each in (scores, there):
        apply_grammar_bitmask(each, [RowConstraint(1, matcher), RowConstraint(4, matcher)])
    assert torch.equal(there.cpu(), scores)
    assert scores[4].isfinite().nonzero().flatten().tolist() == list(range(0, N_VOCAB, 3))
