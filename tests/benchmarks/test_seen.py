"""The arithmetic of `make bench-seen`."""

import pytest
from benchmarks.seen import cost, turn_order


def test_a_cost_is_the_part_of_the_speed_that_is_lost() -> None:
    figures = cost("x", [100.0, 200.0, 100.0], [99.0, 196.0, 101.0])
    assert figures["x"] == 0.01
    assert figures["x_spread"][0] <= 0.01 <= figures["x_spread"][1]
    assert cost("x", [10.0], [10.0])["x"] == 0.0


def test_each_kind_has_each_place_equally_often() -> None:
    kinds = ["a", "b", "c"]
    orders = [turn_order(kinds, number) for number in range(6)]
    for place in range(3):
        assert sorted(order[place] for order in orders) == ["a", "a", "b", "b", "c", "c"]
    with pytest.raises(ZeroDivisionError):
        turn_order([], 0)
