import logging

import pytest

from faasmoe_router.dispatch.calls import CallError
from faasmoe_router.dispatch.retry_policy import LOG_INTERVAL_S, RateLimitedLogger

ADDRESS = "127.0.0.1:9"


@pytest.fixture
def failures(caplog: pytest.LogCaptureFixture) -> RateLimitedLogger:
    caplog.set_level(logging.WARNING)
    return RateLimitedLogger()


def test_the_first_failure_of_each_address_is_told_at_once(
    failures: RateLimitedLogger, caplog: pytest.LogCaptureFixture
) -> None:
    for address in ("a:1", "b:1", "a:1"):
        failures.log_failure(address, CallError("gone"), 5.0)
    assert caplog.messages == ["a call to a:1 failed: gone", "a call to b:1 failed: gone"]


def test_the_later_ones_are_counted_and_told_every_interval(
    failures: RateLimitedLogger, caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(2000):
        failures.log_failure(ADDRESS, CallError(f"failure {n}"), n / 100)  # 20 s
    assert caplog.messages == [
        f"a call to {ADDRESS} failed: failure 0",
        f"1000 more calls to {ADDRESS} failed in 10 s, the last: failure 1000",
    ]


def test_failures_that_are_far_apart_are_told_one_by_one(
    failures: RateLimitedLogger, caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(3):
        failures.log_failure(ADDRESS, CallError("gone"), n * LOG_INTERVAL_S)
    assert caplog.messages == [f"a call to {ADDRESS} failed: gone"] * 3


def test_an_address_that_left_is_forgotten(
    failures: RateLimitedLogger, caplog: pytest.LogCaptureFixture
) -> None:
    failures.log_failure(ADDRESS, CallError("gone"), 0.0)
    failures.retain({ADDRESS})
    failures.log_failure(ADDRESS, CallError("gone"), 1.0)
    failures.retain(set())
    failures.log_failure(ADDRESS, CallError("gone"), 2.0)
    assert len(caplog.messages) == 2
