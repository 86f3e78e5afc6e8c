import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_operator.kube.work_queue import BASE_BACKOFF_S, MAX_BACKOFF_S, WorkQueue


def get_key(queue: WorkQueue[str], now: float) -> str | None:
    found = queue.get(now)
    return None if found is None else found[0]


def test_a_key_is_returned_once_however_often_it_was_added() -> None:
    queue: WorkQueue[str] = WorkQueue()
    for _ in range(3):
        queue.add("a", now=0.0)
    assert get_key(queue, 0.0) == "a"
    assert get_key(queue, 0.0) is None


def test_returns_due_keys_with_their_lateness() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("later", now=0.0, delay_s=5.0)
    queue.add("sooner", now=0.0, delay_s=1.0)
    assert queue.get(0.5) is None
    assert queue.next_due_in_s(0.5) == 0.5
    assert queue.get(6.0) == ("sooner", 5.0)
    assert queue.get(6.0) == ("later", 1.0)


def test_the_earlier_of_two_times_counts() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a", now=0.0, delay_s=10.0)
    queue.add("a", now=0.0, delay_s=1.0)
    queue.add("a", now=0.0, delay_s=5.0)
    assert queue.next_due_in_s(0.0) == 1.0


def test_a_key_added_while_busy_is_returned_after_done() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a", now=0.0)
    queue.get(0.0)
    queue.add("a", now=1.0)
    assert queue.get(1.0) is None
    queue.done("a", now=2.0)
    assert queue.get(2.0) == ("a", 1.0)


def test_done_requeues_after_a_delay() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a", now=0.0)
    queue.get(0.0)
    queue.done("a", now=0.0, requeue_after_s=60.0)
    assert queue.next_due_in_s(0.0) == 60.0


def test_a_done_key_is_forgotten() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a", now=0.0)
    queue.get(0.0)
    queue.done("a", now=0.0)
    assert len(queue) == 0
    assert queue.next_due_in_s(0.0) is None


def test_back_off_grows_up_to_a_maximum() -> None:
    queue: WorkQueue[str] = WorkQueue()
    now, delays_s = 0.0, []
    queue.add("a", now=now)
    for _ in range(40):
        assert get_key(queue, now) == "a"
        delays_s.append(queue.requeue_with_backoff("a", now=now))
        now += delays_s[-1]
    assert delays_s[:3] == [BASE_BACKOFF_S, 2 * BASE_BACKOFF_S, 4 * BASE_BACKOFF_S]
    assert delays_s == sorted(delays_s)
    assert delays_s[-1] == MAX_BACKOFF_S


def test_adding_a_key_does_not_end_its_back_off() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a", now=0.0)
    queue.get(0.0)
    queue.add("a", now=0.0)
    queue.requeue_with_backoff("a", now=0.0, min_delay_s=30.0)
    queue.add("a", now=1.0)
    assert queue.next_due_in_s(1.0) == 29.0


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_urgent_add_ends_the_back_off(when: str) -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a", now=0.0)
    queue.get(0.0)
    if when == "before":
        queue.add("a", now=0.0, urgent=True)
    queue.requeue_with_backoff("a", now=0.0, min_delay_s=30.0)
    if when == "after":
        queue.add("a", now=0.0, urgent=True)
    assert get_key(queue, 0.0) == "a"
    assert queue.requeue_with_backoff("a", now=0.0) == BASE_BACKOFF_S


def test_success_resets_failures() -> None:
    queue: WorkQueue[str] = WorkQueue()
    for _ in range(3):
        queue.add("a", now=0.0, urgent=True)
        queue.get(0.0)
        queue.requeue_with_backoff("a", now=0.0)
    queue.get(100.0)
    queue.done("a", now=100.0, requeue_after_s=0.0)
    queue.get(100.0)
    assert queue.requeue_with_backoff("a", now=100.0) == BASE_BACKOFF_S


KEYS = ["a", "b", "c"]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "urgent", "take", "done", "failed"]),
            st.sampled_from(KEYS),
            st.floats(0, 400),
        ),
        max_size=60,
    )
)
def test_never_returns_a_busy_key_and_loses_none(steps: list[tuple[str, str, float]]) -> None:
    queue: WorkQueue[str] = WorkQueue()
    now, busy, owed = 0.0, set[str](), set[str]()
    for what, key, seconds in steps:
        now += seconds / 10
        if what in ("add", "urgent"):
            queue.add(key, now=now, delay_s=seconds, urgent=what == "urgent")
            owed.add(key)
        elif what == "take" and (found := queue.get(now)) is not None:
            assert found[0] not in busy
            assert found[1] >= 0
            busy.add(found[0])
            owed.discard(found[0])
        elif what == "done" and key in busy:
            busy.discard(key)
            queue.done(key, now=now)
        elif what == "failed" and key in busy:
            busy.discard(key)
            owed.add(key)
            assert 0 <= queue.requeue_with_backoff(key, now=now) <= MAX_BACKOFF_S
    for key in busy:
        queue.done(key, now=now)
    late = now + 1000
    left = {get_key(queue, late) for _ in KEYS} - {None}
    assert left == owed
