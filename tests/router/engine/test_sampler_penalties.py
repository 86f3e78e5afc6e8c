from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from faasmoe_router.engine.sampler import Penalties, RowPenalties, TokenCounts, apply_penalties

N_VOCAB = 30
TOKENS = st.lists(st.integers(0, N_VOCAB - 1), max_size=12)
PENALTIES = st.builds(
    Penalties,
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
    repetition=st.floats(0.1, 3),
)


def _scores(n_rows: int) -> Tensor:
    return torch.randn(n_rows, N_VOCAB, generator=torch.Generator().manual_seed(1)) * 3


def _counts(prompt: list[int], output: list[int]) -> TokenCounts:
    counts = TokenCounts(prompt, max_output_tokens=len(output))
    counts.add_tokens(output)
    return counts


def _expected_penalties(
    scores: Tensor, penalties: Penalties, prompt: list[int], output: list[int]
) -> Tensor:
    """The penalties as OpenAI and vLLM define them, computed token by token."""
    expected = scores.double().clone()
    for token in {*prompt, *output}:
        value = expected[token]
        expected[token] = (
            value / penalties.repetition if value > 0 else value * penalties.repetition
        )
    for token, n_times in Counter(output).items():
        expected[token] -= penalties.frequency * n_times + penalties.presence
    return expected.float()


@given(rows=st.lists(st.tuples(PENALTIES, TOKENS, TOKENS), min_size=1, max_size=4))
def test_penalties_apply_to_the_tokens_of_their_own_row(
    rows: list[tuple[Penalties, list[int], list[int]]],
) -> None:
    scores = _scores(len(rows) + 1)
    expected = scores.clone()
    for row, (penalties, prompt, output) in enumerate(rows):
        expected[row] = _expected_penalties(scores[row], penalties, prompt, output)
    apply_penalties(
        scores,
        [
            RowPenalties(row, penalties, _counts(prompt, output))
            for row, (penalties, prompt, output) in enumerate(rows)
        ],
    )
    assert torch.allclose(scores, expected, atol=1e-5)
    assert scores[-1].equal(expected[-1])  # row without penalties


def test_repetition_penalty_matches_transformers() -> None:
    prompt, output = [3, 5, 3], [7, 5]
    scores = _scores(1)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + output]), scores)
    actual = scores.clone()
    apply_penalties(actual, [RowPenalties(0, Penalties(repetition=1.7), _counts(prompt, output))])
    assert torch.allclose(actual, expected)


@given(tokens=TOKENS, cut=st.integers(0, 12))
def test_counts_are_independent_of_how_tokens_are_batched(tokens: list[int], cut: int) -> None:
    split = TokenCounts([1, 2], max_output_tokens=len(tokens))
    split.add_tokens(tokens[:cut])
    split.add_tokens(tokens[cut:])
    whole = _counts([1, 2], tokens)
    assert split.token_ids.equal(whole.token_ids)
    assert split.counts.equal(whole.counts)


def test_forbidden_tokens_stay_forbidden() -> None:
    scores = torch.full((1, N_VOCAB), -torch.inf)
    penalties = Penalties(presence=-2, frequency=-2, repetition=0.5)
    apply_penalties(scores, [RowPenalties(0, penalties, _counts([], [4, 4]))])
    assert scores.isneginf().all()
