import pytest

from faasmoe_operator.control.executor import (
    CREATE_BACKOFF_DELAYS_S,
    CREATE_BACKOFF_RESET_S,
    CreateBackoff,
)


def test_creates_freely_until_something_fails() -> None:
    assert CreateBackoff().is_allowed(0.0)


def test_waits_longer_with_each_failure_in_a_row() -> None:
    backoff, now = CreateBackoff(), 100.0
    for delay_s in (*CREATE_BACKOFF_DELAYS_S, CREATE_BACKOFF_DELAYS_S[-1]):
        backoff = backoff.after_failure(now)
        assert backoff.until == now + delay_s
        assert backoff.is_allowed(now) is (delay_s == 0)
        now = backoff.until


def test_counts_what_fails_together_as_one_failure() -> None:
    backoff = CreateBackoff().after_failure(10.0).after_failure(10.0)
    for _ in range(50):
        backoff = backoff.after_failure(10.1)
    assert backoff.n_failures == 2
    assert backoff.until == 10.0 + CREATE_BACKOFF_DELAYS_S[1]


@pytest.mark.parametrize("n_failures", [1, 5])
def test_forgets_failures_once_a_sandbox_serves(n_failures: int) -> None:
    backoff = CreateBackoff(n_failures, until=99.0, last_failure_at=10.0).after_success()
    assert backoff.is_allowed(10.0)
    assert backoff.after_failure(10.0).until == 10.0


def test_forgets_failures_of_long_ago() -> None:
    backoff = CreateBackoff(5, until=20.0, last_failure_at=10.0).after_failure(
        11.0 + CREATE_BACKOFF_RESET_S
    )
    assert backoff.n_failures == 1
