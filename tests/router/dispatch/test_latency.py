import math

from hypothesis import given
from hypothesis import strategies as st

from faasmoe_router.dispatch.latency import KEPT, LEAST, Latency


def test_nothing_is_known_of_a_size_before_enough_answers() -> None:
    latency = Latency(0.95)
    for _ in range(LEAST - 1):
        latency.note(8, 0.01)
    assert latency.after_s(8) == math.inf
    latency.note(8, 0.01)
    assert latency.after_s(8) == 0.01
    assert latency.after_s(800) == math.inf


@given(st.lists(st.floats(0.001, 10.0), min_size=LEAST, max_size=3 * KEPT))
def test_it_is_a_time_that_was_seen_and_that_most_kept_within(times_s: list[float]) -> None:
    latency = Latency(0.9)
    for took_s in times_s:
        latency.note(1, took_s)
    found_s = latency.after_s(1)
    assert found_s in times_s
    first = times_s[:LEAST]
    if len(times_s) == LEAST:
        assert sum(t <= found_s for t in first) >= 0.9 * LEAST


def test_it_follows_a_change_within_what_is_kept() -> None:
    latency = Latency(0.95)
    for _ in range(KEPT):
        latency.note(1, 0.001)
    for _ in range(KEPT):
        latency.note(1, 0.1)
    assert latency.after_s(1) == 0.1
