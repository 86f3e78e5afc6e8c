import math

from faasmoe_router.control.activator import PendingActivations


def test_what_many_want_is_asked_for_once() -> None:
    pending = PendingActivations(1.0)
    for _ in range(32):
        pending.add(["f", "g"])
    assert pending.pop_due(10.0) == ["f", "g"]
    assert pending.pop_due(10.0) == []
    assert pending.next_due_s() == math.inf


def test_a_wish_too_soon_after_the_last_is_kept_until_its_time() -> None:
    pending = PendingActivations(1.0)
    pending.add(["f"])
    pending.pop_due(10.0)
    pending.add(["f", "g"])
    assert pending.next_due_s() == -math.inf
    assert pending.pop_due(10.1) == ["g"]
    assert pending.next_due_s() == 11.0
    assert pending.pop_due(10.9) == []
    assert pending.pop_due(11.0) == ["f"]


def test_nothing_is_asked_for_that_nobody_wants_again() -> None:
    pending = PendingActivations(1.0)
    pending.add(["f"])
    pending.pop_due(0.0)
    assert pending.pop_due(100.0) == []


def test_what_has_an_address_is_not_asked_for_and_begins_anew() -> None:
    pending = PendingActivations(1.0)
    pending.add(["f", "g"])
    pending.retain({"g"})
    assert pending.pop_due(0.0) == ["g"]
    pending.retain(set())
    pending.add(["g"])
    assert pending.pop_due(0.1) == ["g"]


def test_another_control_process_is_asked_at_once() -> None:
    pending = PendingActivations(1.0)
    pending.add(["f"])
    pending.pop_due(0.0)
    pending.reset_requested()
    pending.add(["f"])
    assert pending.pop_due(0.1) == ["f"]
