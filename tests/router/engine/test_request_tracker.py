"""How long a refused client should wait follows from how often sequences end."""

from faasmoe_router.engine.fair_queue import FairQueue, Share
from faasmoe_router.engine.request_tracker import MAX_RETRY_AFTER_S, FinishRate


def test_the_wait_follows_the_rate() -> None:
    rate = FinishRate()
    assert rate.seconds_until(1, 0.0) == 1.0
    for now_s in range(0, 40, 4):
        rate.record(float(now_s))
    assert rate.seconds_until(1, 40.0) == 4.0
    assert rate.seconds_until(5, 40.0) == 20.0
    assert rate.seconds_until(1, 1e6) == MAX_RETRY_AFTER_S  # nothing ends any more


def test_the_most_sequences_of_a_tenant() -> None:
    queue = FairQueue(slots=8, max_queued=10)
    assert queue.max_sequences("anyone") == 18
    queue.set_shares({"small": Share(max_running=2, max_queued=1), "large": Share()})
    assert queue.max_sequences("small") == 3
    assert queue.max_sequences("large") == 13
