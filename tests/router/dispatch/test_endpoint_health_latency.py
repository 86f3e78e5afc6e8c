"""Latency quantiles by size class."""

import math

from hypothesis import given
from hypothesis import strategies as st

from faasmoe_router.dispatch.latency_tracker import MIN_SAMPLES, WINDOW_SIZE, LatencyTracker


def test_quantile_is_unknown_before_enough_samples_of_a_size() -> None:
    latency = LatencyTracker(0.95)
    for _ in range(MIN_SAMPLES - 1):
        latency.record(8, 0.01)
    assert latency.quantile_s(8) == math.inf
    latency.record(8, 0.01)
    assert latency.quantile_s(8) == 0.01
    assert latency.quantile_s(800) == math.inf


@given(st.lists(st.floats(0.001, 10.0), min_size=MIN_SAMPLES, max_size=3 * WINDOW_SIZE))
def test_quantile_is_an_observed_time_that_bounds_most_samples(times_s: list[float]) -> None:
    latency = LatencyTracker(0.9)
    for elapsed_s in times_s:
        latency.record(1, elapsed_s)
    found_s = latency.quantile_s(1)
    assert found_s in times_s
    first = times_s[:MIN_SAMPLES]
    if len(times_s) == MIN_SAMPLES:
        assert sum(t <= found_s for t in first) >= 0.9 * MIN_SAMPLES


def test_quantile_follows_a_change_within_one_window() -> None:
    latency = LatencyTracker(0.95)
    for _ in range(WINDOW_SIZE):
        latency.record(1, 0.001)
    for _ in range(WINDOW_SIZE):
        latency.record(1, 0.1)
    assert latency.quantile_s(1) == 0.1
