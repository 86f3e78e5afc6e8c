import pytest

from faasmoe_contracts.backoff import Backoff, ExponentialBackoff

DELAYS_S = (0.0, 0.5, 2.0)
RESET_AFTER_S = 120.0


def test_exponential_delays_double_up_to_the_maximum() -> None:
    backoff = ExponentialBackoff(0.1, 0.5)
    delays_s = [backoff.next_delay_s(1.0) for _ in range(5)]
    assert delays_s == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5])


def test_exponential_delays_grow_by_the_factor() -> None:
    backoff = ExponentialBackoff(0.5, 100.0, factor=4.0)
    assert [backoff.next_delay_s() for _ in range(3)] == [0.5, 2.0, 8.0]


def test_jitter_reduces_a_delay_by_at_most_its_fraction() -> None:
    backoff = ExponentialBackoff(0.1, 1.0, jitter=0.5)
    assert backoff.next_delay_s(0.0) == pytest.approx(0.05)
    assert backoff.next_delay_s(0.5) == pytest.approx(0.15)


def test_starts_over_after_a_reset() -> None:
    backoff = ExponentialBackoff(0.1, 1.0)
    backoff.next_delay_s(1.0)
    backoff.reset()
    assert backoff.next_delay_s(1.0) == pytest.approx(0.1)


def test_does_not_block_before_the_first_failure() -> None:
    assert not Backoff(DELAYS_S).is_blocked(0.0)


def test_blocks_longer_with_each_failure_in_a_row() -> None:
    backoff, now = Backoff(DELAYS_S), 100.0
    for delay_s in (*DELAYS_S, DELAYS_S[-1]):
        backoff.record_failure(now)
        assert backoff.blocked_until == now + delay_s
        assert backoff.is_blocked(now) is (delay_s > 0)
        now = backoff.blocked_until
        assert not backoff.is_blocked(now)


def test_coalesces_failures_while_blocked() -> None:
    backoff = Backoff(DELAYS_S, coalesce=True)
    backoff.record_failure(10.0)
    backoff.record_failure(10.0)
    for _ in range(50):
        backoff.record_failure(10.1)
    assert backoff.n_failures == 2
    assert backoff.blocked_until == 10.0 + DELAYS_S[1]


def test_counts_every_failure_without_coalescing() -> None:
    backoff = Backoff(DELAYS_S)
    for _ in range(3):
        backoff.record_failure(10.0)
    assert backoff.n_failures == 3
    assert backoff.blocked_until == 10.0 + DELAYS_S[2]


@pytest.mark.parametrize("n_failures", [1, 5])
def test_a_success_ends_the_delay_and_resets_the_failures(n_failures: int) -> None:
    backoff = Backoff(DELAYS_S)
    for _ in range(n_failures):
        backoff.record_failure(10.0)
    backoff.reset()
    assert not backoff.is_blocked(10.0)
    backoff.record_failure(10.0)
    assert backoff.blocked_until == 10.0


def test_forgets_failures_of_long_ago() -> None:
    backoff = Backoff(DELAYS_S, reset_after_s=RESET_AFTER_S)
    for _ in range(5):
        backoff.record_failure(10.0)
    backoff.record_failure(11.0 + RESET_AFTER_S)
    assert backoff.n_failures == 1
