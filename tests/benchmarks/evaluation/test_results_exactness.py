import pytest
from benchmarks.evaluation.results import Agreement, mean_agreement, text_agreement


def test_counts_texts_and_the_characters_before_a_difference() -> None:
    some = {"0-0": "abcd", "0-1": "same"}
    others = {"0-0": "abXd", "0-1": "same"}
    assert text_agreement(some, others) == Agreement(0.5, 6 / 8)


def test_a_text_that_ends_early_is_another_one() -> None:
    assert text_agreement({"a": "ab"}, {"a": "abcd"}) == Agreement(0.0, 0.5)


def test_compares_what_both_answered() -> None:
    assert text_agreement({"a": "x", "failed": "y"}, {"a": "x"}) == Agreement(1.0, 1.0)
    assert text_agreement({"a": "x"}, {"b": "x"}) is None


def test_empty_texts_are_equal() -> None:
    assert text_agreement({"a": ""}, {"a": ""}) == Agreement(1.0, 1.0)


def test_no_run_is_compared_with_itself() -> None:
    first, second = {"a": "ab"}, {"a": "aX"}
    assert mean_agreement([first, second], [first, second]) == Agreement(0.0, 0.5)
    assert mean_agreement([first], [first]) is None


def test_takes_the_mean_over_all_pairs() -> None:
    found = mean_agreement([{"a": "ab"}], [{"a": "ab"}, {"a": "aX"}])
    assert found is not None
    assert found.equal_texts == pytest.approx(0.5)
    assert found.equal_characters == pytest.approx(0.75)
