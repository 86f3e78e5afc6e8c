"""Rows, options and plot of the growth of cost."""

import argparse
from pathlib import Path

import pytest
from benchmarks.evaluation.plots import growth_plot
from benchmarks.growth import _numbers, format_growth, make_row, measure
from benchmarks.growth_models import ModelsAtRest, rows_of


def test_growth_that_is_worse_than_linear_has_a_reason() -> None:
    assert "reason" not in make_row("functions", {10: 1.0, 100: 10.0}, "")
    assert make_row("functions", {10: 1.0, 100: 100.0}, "pairs")["reason"] == "pairs"
    assert make_row("functions", {10: 1.0, 100: 100.0}, "")["reason"] == "not explained"
    assert make_row("models", {1: 5.0}, "")["exponent"] is None


def test_models_at_rest_are_rows_by_their_number() -> None:
    found = {1: ModelsAtRest(100, 0.01, 5), 20: ModelsAtRest(300, 0.04, 5)}
    assert rows_of(found) == {
        "memory at rest, bytes": {1: 100.0, 20: 300.0},
        "CPU at rest, cores": {1: 0.01, 20: 0.04},
        "processes at rest": {1: 5.0, 20: 5.0},
    }


@pytest.mark.parametrize("text", ["x", "-1", "0,5", ""])
def test_numbers_of_models_are_checked(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"got {text}, expected numbers from 1"):
        _numbers(text)


def test_numbers_of_models_are_sorted_and_zero_is_none() -> None:
    assert _numbers("20,1,5") == (1, 5, 20)
    assert _numbers("0") == ()


def test_small_sizes_are_measured_printed_and_plotted(tmp_path: Path) -> None:
    figures = measure(largest=10, cache=tmp_path)
    assert all(set(row["values"]) for row in figures["rows"].values())
    assert "load reports added up" in format_growth(figures)
    assert growth_plot(figures["rows"])["png"].startswith(b"\x89PNG")
