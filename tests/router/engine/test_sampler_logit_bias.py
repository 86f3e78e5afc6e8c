import pytest
import torch

from faasmoe_router.engine.sampler import FORBIDDEN, LogitBias, RowBias, apply_logit_bias


def test_biases_apply_to_their_own_rows() -> None:
    scores = torch.zeros(3, 5)
    apply_logit_bias(scores, [RowBias(0, [(1, 2.5), (4, FORBIDDEN)]), RowBias(2, [(0, -1.0)])])
    assert scores.tolist() == [
        [0, 2.5, 0, 0, -torch.inf],
        [0, 0, 0, 0, 0],
        [-1, 0, 0, 0, 0],
    ]


def test_forbidden_token_stays_forbidden_despite_a_bias() -> None:
    scores = torch.zeros(1, 3)
    apply_logit_bias(scores, [RowBias(0, [(1, 100.0), (1, FORBIDDEN)])])
    assert scores[0].tolist() == [0, -torch.inf, 0]


def test_allowed_tokens_can_be_biased_and_all_others_are_masked() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    apply_logit_bias(scores, [RowBias(1, [(0, 5.0), (2, 5.0)], allowed_token_ids=(0, 1))])
    assert scores.tolist() == [[1, 2, 3], [6, 2, -torch.inf]]


@pytest.mark.parametrize(
    ("output", "forbidden"),
    [
        pytest.param([], [9], id="no-output"),
        pytest.param([1], [9], id="partial-match"),
        pytest.param([5, 1, 2], [3, 9], id="complete-prefix"),
        pytest.param([1, 2, 5], [9], id="interrupted-prefix"),
    ],
)
def test_bad_word_is_forbidden_at_its_last_token(output: list[int], forbidden: list[int]) -> None:
    bias = LogitBias(bad_words_token_ids=((1, 2, 3), (9,)))
    assert bias.max_bad_word_length == 3
    assert sorted(bias.adjustments(output)) == [(token, FORBIDDEN) for token in forbidden]


def test_default_logit_bias_is_neutral() -> None:
    assert LogitBias().is_neutral
    assert not LogitBias(allowed_token_ids=(1,)).is_neutral
