import pytest

from faasmoe_operator.control.function_stats import HALF_LIFE_S, FunctionPopularity


def test_sorts_by_rows_and_keeps_the_order_of_ties() -> None:
    popularity = FunctionPopularity(now=0.0)
    popularity.add([("b", 5), ("d", 9), ("c", 5)], now=0.0)
    assert popularity.sorted_by_rows(["a", "b", "c", "d", "e"]) == ["d", "b", "c", "a", "e"]


def test_rows_halve_every_half_life() -> None:
    popularity = FunctionPopularity({"f": 8.0}, now=0.0)
    assert popularity.rows(HALF_LIFE_S) == {"f": pytest.approx(4.0)}
    popularity.add([("f", 4)], now=HALF_LIFE_S)
    assert popularity.rows(3 * HALF_LIFE_S) == {"f": pytest.approx(2.0)}


def test_recent_rows_outweigh_old_ones() -> None:
    popularity = FunctionPopularity({"old": 100.0}, now=0.0)
    popularity.add([("new", 10)], now=5 * HALF_LIFE_S)
    assert popularity.sorted_by_rows(["old", "new"]) == ["new", "old"]


def test_drops_negligible_rows() -> None:
    assert FunctionPopularity({"f": 1.0}, now=0.0).rows(10 * HALF_LIFE_S) == {}


def test_tolerates_a_clock_that_stops_or_goes_back() -> None:
    popularity = FunctionPopularity({"f": 2.0}, now=10.0)
    assert popularity.rows(10.0) == popularity.rows(5.0) == {"f": 2.0}
