"""Rate-limited logging of failed calls."""

import logging

import pytest

from faasmoe_router.dispatch.retry_policy import LOG_INTERVAL_S, RateLimitedLogger
from faasmoe_router.dispatch.transport import CallError

ADDRESS = "127.0.0.1:9"


@pytest.fixture
def failure_logger(caplog: pytest.LogCaptureFixture) -> RateLimitedLogger:
    caplog.set_level(logging.WARNING)
    return RateLimitedLogger()


def test_first_failure_of_each_address_is_logged_immediately(
    failure_logger: RateLimitedLogger, caplog: pytest.LogCaptureFixture
) -> None:
    for address in ("a:1", "b:1", "a:1"):
        failure_logger.log_failure(address, CallError("gone"), 5.0)
    assert caplog.messages == ["Call to a:1 failed: gone", "Call to b:1 failed: gone"]


def test_later_failures_are_counted_and_logged_every_interval(
    failure_logger: RateLimitedLogger, caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(2000):
        failure_logger.log_failure(ADDRESS, CallError(f"failure {n}"), n / 100)  # 20 s
    assert caplog.messages == [
        f"Call to {ADDRESS} failed: failure 0",
        f"1000 more calls to {ADDRESS} failed in 10 s, most recently: failure 1000",
    ]


def test_failures_far_apart_are_logged_one_by_one(
    failure_logger: RateLimitedLogger, caplog: pytest.LogCaptureFixture
) -> None:
    for n in range(3):
        failure_logger.log_failure(ADDRESS, CallError("gone"), n * LOG_INTERVAL_S)
    assert caplog.messages == [f"Call to {ADDRESS} failed: gone"] * 3


def test_retain_forgets_other_addresses(
    failure_logger: RateLimitedLogger, caplog: pytest.LogCaptureFixture
) -> None:
    failure_logger.log_failure(ADDRESS, CallError("gone"), 0.0)
    failure_logger.retain({ADDRESS})
    failure_logger.log_failure(ADDRESS, CallError("gone"), 1.0)
    failure_logger.retain(set())
    failure_logger.log_failure(ADDRESS, CallError("gone"), 2.0)
    assert len(caplog.messages) == 2
