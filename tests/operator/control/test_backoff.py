import pytest

from faasmoe_operator.control.backoff import DELAYS_S, FORGET_AFTER_S, Backoff


def test_creates_freely_until_something_fails() -> None:
    assert Backoff().is_open(0.0)


def test_waits_longer_with_each_failure_in_a_row() -> None:
    backoff, now = Backoff(), 100.0
    for delay_s in (*DELAYS_S, DELAYS_S[-1]):
        backoff = backoff.failed(now)
        assert backoff.until == now + delay_s
        assert backoff.is_open(now) is (delay_s == 0)
        now = backoff.until


def test_counts_what_fails_together_as_one_failure() -> None:
    backoff = Backoff().failed(10.0).failed(10.0)
    for _ in range(50):
        backoff = backoff.failed(10.1)
    assert backoff.n_failures == 2
    assert backoff.until == 10.0 + DELAYS_S[1]


@pytest.mark.parametrize("n_failures", [1, 5])
def test_forgets_failures_once_a_sandbox_serves(n_failures: int) -> None:
    backoff = Backoff(n_failures, until=99.0, last=10.0).succeeded()
    assert backoff.is_open(10.0)
    assert backoff.failed(10.0).until == 10.0


def test_forgets_failures_of_long_ago() -> None:
    backoff = Backoff(5, until=20.0, last=10.0).failed(11.0 + FORGET_AFTER_S)
    assert backoff.n_failures == 1
