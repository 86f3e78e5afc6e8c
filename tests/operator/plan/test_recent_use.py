"""How recently something was used, later than it was if it is used often."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_operator.plan.recent_use import HALF_LIFE_S, RecentUse


def used(*times: float) -> float:
    use = RecentUse()
    for time in times:
        use.add(time)
    return use.time


def weight(times: Iterable[float], now: float) -> float:
    """Return what uses count at a time."""
    return sum(float(2 ** ((time - now) / HALF_LIFE_S)) for time in times)


def test_what_was_used_once_or_long_ago_counts_by_its_last_use() -> None:
    assert used(100.0) == 100.0
    assert used(0.0, 100 * HALF_LIFE_S) == pytest.approx(100 * HALF_LIFE_S)
    assert used() < used(0.0)


def test_what_is_used_often_stays_longer_than_what_was_used_once_since() -> None:
    often = used(*range(10))
    assert used(9.0) < used(60.0) < often < used(200.0)


@given(
    st.lists(st.floats(0, 500), min_size=1, max_size=20), st.lists(st.floats(0, 500), min_size=1)
)
def test_order_is_that_of_uses_that_count_half_after_each_half_life(
    a: list[float], b: list[float]
) -> None:
    a, b = sorted(a), sorted(b)
    heavier = weight(a, 500.0) - weight(b, 500.0)
    if abs(heavier) > 1e-6:
        assert (used(*a) > used(*b)) == (heavier > 0)
