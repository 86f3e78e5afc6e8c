from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_operator.scaling.windows import LoadAverages, LoadWindows, NoData, SlidingWindow


def filled(*values: float, size: int = 60, begin: int = 100) -> SlidingWindow:
    window = SlidingWindow(size)
    for second, value in enumerate(values, start=begin):
        window.record(second, value)
    return window


def test_new_window_averages_over_the_seconds_since_the_first_record() -> None:
    # Three seconds of a 60 s window: (2 + 4 + 6) / 3, not / 60.
    assert filled(2, 4, 6).average(102) == 4


def test_full_window_averages_over_its_whole_length() -> None:
    # 70 seconds: ten of 100 have left the window, sixty of 1 remain.
    assert filled(*[100] * 10, *[1] * 60).average(169) == 1


def test_full_window_slides() -> None:
    # Window of 6 s over 1..8: 3..8 remain, 33 / 6.
    assert filled(1, 2, 3, 4, 5, 6, 7, 8, size=6).average(107) == 5.5


def test_records_of_one_second_are_summed() -> None:
    window = SlidingWindow(6)
    for now in (100.0, 100.3, 100.99):
        window.record(now, 2)
    assert window.average(100.999) == 6


def test_gap_between_records_counts_as_zero() -> None:
    window = SlidingWindow(60)
    window.record(100, 9)
    window.record(102, 9)
    # 9, 0, 9 over three seconds.
    assert window.average(102) == 6


def test_seconds_after_the_last_record_do_not_count() -> None:
    # Window of 6 s, six records of 3, then two seconds without: the four that remain, 12 / 4.
    assert filled(3, 3, 3, 3, 3, 3, size=6).average(107) == 3


def test_partial_window_divides_by_the_recorded_seconds() -> None:
    # Two seconds with records, one without: 8 / min(2, 6 - 1).
    assert filled(4, 4, size=6).average(102) == 4


def test_window_is_empty_after_its_length_without_records() -> None:
    window = filled(5, 5, 5, size=6)  # the last at 102
    assert not window.is_empty(107.9)
    assert window.is_empty(108)
    assert window.average(108) == 0


def test_window_restarts_after_its_length_without_records() -> None:
    window = filled(*[1] * 60)  # the last at 159
    window.record(219, 32)
    assert window.average(219) == 32


def test_late_record_counts_in_its_own_second() -> None:
    window = filled(4, 4, 4, size=6)
    window.record(101, 3)
    assert window.average(102) == 5


def test_late_record_before_the_first_extends_the_window() -> None:
    window = SlidingWindow(60)
    window.record(100, 6)
    window.record(98, 3)
    # 3, 0, 6.
    assert window.average(100) == 3


def test_record_older_than_the_window_is_ignored() -> None:
    window = filled(4, 4, size=6)  # the last at 101
    window.record(95, 1000)
    assert window.average(101) == 4


def test_average_for_a_past_time_is_the_latest() -> None:
    assert filled(4, 8).average(90) == 6


def test_empty_window_averages_zero() -> None:
    assert SlidingWindow(60).average(5) == 0
    assert SlidingWindow(60).is_empty(5)


def test_averages_are_truncated_to_six_decimals() -> None:
    # 1 / 3 = 0.3333333…
    assert filled(1, 0, 0).average(102) == 0.333333


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        pytest.param(3, 5.0, id="shorter keeps the newest: (4 + 5 + 6) / 3"),
        pytest.param(60, 3.5, id="longer keeps all: 21 / 6"),
    ],
)
def test_resized_window_keeps_its_records(size: int, expected: float) -> None:
    assert filled(1, 2, 3, 4, 5, 6, size=6).resized(size).average(105) == expected


def test_resized_empty_window_is_empty() -> None:
    assert SlidingWindow(6).resized(60).is_empty(0)


def test_fractional_window_is_rounded_up_to_whole_seconds() -> None:
    # 6.5 s: seven buckets.
    assert filled(*[7] * 3, *[0] * 4, size=7).average(106) == filled(7, 7, 7, 0, 0, 0, 0).average(
        106
    )
    window = SlidingWindow(6.5)
    for second in range(10):
        window.record(second, second)
    assert window.average(9) == 6  # 3..9


def test_no_record_is_no_data() -> None:
    assert LoadWindows(stable_s=60, panic_s=6).load(0) == NoData()


def test_both_windows_average_their_own_seconds() -> None:
    windows = LoadWindows(stable_s=60, panic_s=6)
    for second in range(60):
        windows.record(second, 10 if second < 54 else 50)
    # Stable (54 * 10 + 6 * 50) / 60 = 14; panic 50.
    assert windows.load(59) == LoadAverages(stable=14, panic=50)


def test_panic_window_empties_first_without_records() -> None:
    windows = LoadWindows(stable_s=60, panic_s=6)
    windows.record(0, 10)
    assert windows.load(6) == LoadAverages(stable=10, panic=0)
    assert windows.load(59) == LoadAverages(stable=10, panic=0)
    assert windows.load(60) == NoData()


def test_resizes_both_windows() -> None:
    windows = LoadWindows(stable_s=60, panic_s=6)
    for second in range(10):
        windows.record(second, second)
    windows.resize(stable_s=8, panic_s=2)
    # Stable 2..9 = 44 / 8; panic (8 + 9) / 2.
    assert windows.load(9) == LoadAverages(stable=5.5, panic=8.5)


REPORTS = st.lists(st.tuples(st.floats(0, 200), st.floats(0, 1000)), min_size=1, max_size=60).map(
    sorted
)


@given(reports=REPORTS, size=st.integers(1, 30), silence_s=st.integers(0, 40))
def test_average_equals_a_reference_implementation(
    reports: list[tuple[float, float]], size: int, silence_s: int
) -> None:
    window = SlidingWindow(size)
    for now, value in reports:
        window.record(now, value)
    now = reports[-1][0] + silence_s

    seconds = [int(at) for at, _ in reports]
    first = seconds[0]
    for before, after in pairwise(seconds):
        first = after if after - before >= size else first
    oldest = int(now) - size + 1
    total = sum(value for at, value in reports if int(at) >= max(first, oldest))
    n_seconds = min(seconds[-1] - first + 1, size - (int(now) - seconds[-1]))
    expected = total / n_seconds if n_seconds > 0 else 0
    assert window.average(now) == pytest.approx(expected, abs=1.1e-6)
