import math

from faasmoe_router.control.activator import PendingActivations


def test_a_function_is_requested_once_for_many_callers() -> None:
    pending = PendingActivations(1.0)
    for _ in range(32):
        pending.add(["f", "g"])
    assert pending.pop_due(10.0) == ["f", "g"]
    assert pending.pop_due(10.0) == []
    assert pending.next_due_s() == math.inf


def test_a_repeated_request_is_due_after_the_repeat_interval() -> None:
    pending = PendingActivations(1.0)
    pending.add(["f"])
    pending.pop_due(10.0)
    pending.add(["f", "g"])
    assert pending.next_due_s() == -math.inf
    assert pending.pop_due(10.1) == ["g"]
    assert pending.next_due_s() == 11.0
    assert pending.pop_due(10.9) == []
    assert pending.pop_due(11.0) == ["f"]


def test_a_function_is_not_requested_again_unless_it_is_added_again() -> None:
    pending = PendingActivations(1.0)
    pending.add(["f"])
    pending.pop_due(0.0)
    assert pending.pop_due(100.0) == []


def test_a_function_with_an_address_is_dropped_with_its_history() -> None:
    pending = PendingActivations(1.0)
    pending.add(["f", "g"])
    pending.retain({"g"})
    assert pending.pop_due(0.0) == ["g"]
    pending.retain(set())
    pending.add(["g"])
    assert pending.pop_due(0.1) == ["g"]


def test_a_restarted_control_process_is_asked_immediately() -> None:
    pending = PendingActivations(1.0)
    pending.add(["f"])
    pending.pop_due(0.0)
    pending.reset_requested()
    pending.add(["f"])
    assert pending.pop_due(0.1) == ["f"]
