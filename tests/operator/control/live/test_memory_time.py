"""Memory over time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_operator.control.live.memory_time import MemoryTime


def test_active_memory_is_added_up_between_changes() -> None:
    memory = MemoryTime(4_000_000_000, now=10)
    memory.update(1_000_000_000, now=12)
    memory.update(2_000_000_000, now=15)
    assert memory.active_gb_seconds(16) == pytest.approx(3 + 2)
    assert memory.resident_gb_seconds(16) == pytest.approx(6 * 4)


def test_a_clock_that_goes_back_takes_nothing_away() -> None:
    memory = MemoryTime(1_000_000_000, now=10)
    memory.update(1_000_000_000, now=11)
    memory.update(1_000_000_000, now=9)
    assert memory.active_gb_seconds(12) == pytest.approx(1)


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 10**9)), max_size=20))
def test_active_memory_is_never_more_than_all_were(changes: list[tuple[float, int]]) -> None:
    memory, now = MemoryTime(10**9, now=0), 0.0
    for seconds, size in changes:
        now += seconds
        memory.update(size, now=now)
    assert 0 <= memory.active_gb_seconds(now) <= memory.resident_gb_seconds(now) * (1 + 1e-9)
