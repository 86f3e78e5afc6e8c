import pytest
from benchmarks.evaluation.results import Agreement, mean_agreement, text_agreement


def test_counts_equal_texts_and_characters_before_first_difference() -> None:
    first = {"0-0": "abcd", "0-1": "same"}
    second = {"0-0": "abXd", "0-1": "same"}
    assert text_agreement(first, second) == Agreement(0.5, 6 / 8)


def test_prefix_is_a_different_text() -> None:
    assert text_agreement({"a": "ab"}, {"a": "abcd"}) == Agreement(0.0, 0.5)


def test_compares_requests_of_both_runs() -> None:
    assert text_agreement({"a": "x", "failed": "y"}, {"a": "x"}) == Agreement(1.0, 1.0)
    assert text_agreement({"a": "x"}, {"b": "x"}) is None


def test_empty_texts_are_equal() -> None:
    assert text_agreement({"a": ""}, {"a": ""}) == Agreement(1.0, 1.0)


def test_run_is_not_compared_with_itself() -> None:
    first, second = {"a": "ab"}, {"a": "aX"}
    assert mean_agreement([first, second], [first, second]) == Agreement(0.0, 0.5)
    assert mean_agreement([first], [first]) is None


def test_mean_agreement_over_all_pairs() -> None:
    found = mean_agreement([{"a": "ab"}], [{"a": "ab"}, {"a": "aX"}])
    assert found is not None
    assert found.equal_texts == pytest.approx(0.5)
    assert found.equal_characters == pytest.approx(0.75)
