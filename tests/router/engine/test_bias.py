import pytest
import torch

from faasmoe_router.engine.bias import FORBIDDEN, Bias, Biased, add_biases


def test_rows_get_their_own_biases() -> None:
    scores = torch.zeros(3, 5)
    add_biases(scores, [Biased(0, [(1, 2.5), (4, FORBIDDEN)]), Biased(2, [(0, -1.0)])])
    assert scores.tolist() == [
        [0, 2.5, 0, 0, -torch.inf],
        [0, 0, 0, 0, 0],
        [-1, 0, 0, 0, 0],
    ]


def test_a_bias_and_a_ban_of_one_token_make_a_ban() -> None:
    scores = torch.zeros(1, 3)
    add_biases(scores, [Biased(0, [(1, 100.0), (1, FORBIDDEN)])])
    assert scores[0].tolist() == [0, -torch.inf, 0]


def test_only_allowed_tokens_are_left_and_may_be_biased() -> None:
    scores = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    add_biases(scores, [Biased(1, [(0, 5.0), (2, 5.0)], allowed=(0, 1))])
    assert scores.tolist() == [[1, 2, 3], [6, 2, -torch.inf]]


@pytest.mark.parametrize(
    ("output", "forbidden"),
    [
        pytest.param([], [9], id="nothing-yet"),
        pytest.param([1], [9], id="half"),
        pytest.param([5, 1, 2], [3, 9], id="all-but-the-last"),
        pytest.param([1, 2, 5], [9], id="something-between"),
    ],
)
def test_a_bad_word_is_forbidden_at_its_last_token(output: list[int], forbidden: list[int]) -> None:
    bias = Bias(bad_words=((1, 2, 3), (9,)))
    assert bias.longest_bad_word == 3
    assert sorted(bias.changes(output)) == [(token, FORBIDDEN) for token in forbidden]


def test_a_request_that_asks_for_nothing_is_neutral() -> None:
    assert Bias().neutral
    assert not Bias(allowed=(1,)).neutral
