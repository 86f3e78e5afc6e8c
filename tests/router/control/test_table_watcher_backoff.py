import pytest

from faasmoe_router.control.table_watcher import ReconnectBackoff


def test_waits_double_up_to_the_most() -> None:
    backoff = ReconnectBackoff(0.1, 0.5)
    waits = [backoff.next_delay_s(1.0) for _ in range(5)]
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.5, 0.5])


def test_chance_halves_a_wait_at_most() -> None:
    backoff = ReconnectBackoff(0.1, 1.0)
    assert backoff.next_delay_s(0.0) == pytest.approx(0.05)
    assert backoff.next_delay_s(0.5) == pytest.approx(0.15)


def test_begins_again_after_a_reset() -> None:
    backoff = ReconnectBackoff(0.1, 1.0)
    backoff.next_delay_s(1.0)
    backoff.reset()
    assert backoff.next_delay_s(1.0) == pytest.approx(0.1)
