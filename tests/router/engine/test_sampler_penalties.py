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
    """The rule as OpenAI and vLLM write it down, a token at a time."""
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
def test_each_row_pays_for_its_own_tokens(
    rows: list[tuple[Penalties, list[int], list[int]]],
) -> None:
    scores = _scores(len(rows) + 1)
    expected = scores.clone()
    for row, (asked, prompt, output) in enumerate(rows):
        expected[row] = _expected_penalties(scores[row], asked, prompt, output)
    apply_penalties(
        scores,
        [
            RowPenalties(row, asked, _counts(prompt, output))
            for row, (asked, prompt, output) in enumerate(rows)
        ],
    )
    assert torch.allclose(scores, expected, atol=1e-5)
    assert scores[-1].equal(expected[-1])  # asked for nothing


def test_repetition_is_transformers_own() -> None:
    prompt, output = [3, 5, 3], [7, 5]
    scores = _scores(1)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + output]), scores)
    ours = scores.clone()
    apply_penalties(ours, [RowPenalties(0, Penalties(repetition=1.7), _counts(prompt, output))])
    assert torch.allclose(ours, expected)


@given(tokens=TOKENS, cut=st.integers(0, 12))
def test_tokens_count_the_same_however_they_come(tokens: list[int], cut: int) -> None:
    pieces = TokenCounts([1, 2], max_output_tokens=len(tokens))
    pieces.add_tokens(tokens[:cut])
    pieces.add_tokens(tokens[cut:])
    whole = _counts([1, 2], tokens)
    assert pieces.token_ids.equal(whole.token_ids)
    assert pieces.counts.equal(whole.counts)


def test_forbidden_tokens_stay_forbidden() -> None:
    scores = torch.full((1, N_VOCAB), -torch.inf)
    asked = Penalties(presence=-2, frequency=-2, repetition=0.5)
    apply_penalties(scores, [RowPenalties(0, asked, _counts([], [4, 4]))])
    assert scores.isneginf().all()
