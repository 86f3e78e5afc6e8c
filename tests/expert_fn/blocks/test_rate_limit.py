"""Bytes are delayed so that no more leave than the rate allows."""

import pytest

from faasmoe_expert.blocks.rate_limit import BURST_S, ByteRateLimiter


def test_nothing_waits_after_a_pause() -> None:
    limiter = ByteRateLimiter(1000)
    assert limiter.reserve(500, 10.0) == 0.0
    assert limiter.reserve(10, 100.0) == 0.0


def test_bytes_leave_at_the_rate() -> None:
    limiter, now = ByteRateLimiter(1000), 5.0
    for _ in range(100):
        now += limiter.reserve(100, now)
    assert now == pytest.approx(5.0 + 99 * 0.1 - BURST_S)


def test_waits_of_several_threads_add_up() -> None:
    limiter = ByteRateLimiter(1000)
    waits = [limiter.reserve(1000, 0.0) for _ in range(3)]
    assert waits == pytest.approx([0.0, 1.0 - BURST_S, 2.0 - BURST_S])
