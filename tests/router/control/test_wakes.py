import math

from faasmoe_router.control.wakes import WakeRegister


def test_what_many_want_is_asked_for_once() -> None:
    wakes = WakeRegister(1.0)
    for _ in range(32):
        wakes.want(["f", "g"])
    assert wakes.take_due(10.0) == ["f", "g"]
    assert wakes.take_due(10.0) == []
    assert wakes.next_s() == math.inf


def test_a_wish_too_soon_after_the_last_is_kept_until_its_time() -> None:
    wakes = WakeRegister(1.0)
    wakes.want(["f"])
    wakes.take_due(10.0)
    wakes.want(["f", "g"])
    assert wakes.next_s() == -math.inf
    assert wakes.take_due(10.1) == ["g"]
    assert wakes.next_s() == 11.0
    assert wakes.take_due(10.9) == []
    assert wakes.take_due(11.0) == ["f"]


def test_nothing_is_asked_for_that_nobody_wants_again() -> None:
    wakes = WakeRegister(1.0)
    wakes.want(["f"])
    wakes.take_due(0.0)
    assert wakes.take_due(100.0) == []


def test_what_has_an_address_is_not_asked_for_and_begins_anew() -> None:
    wakes = WakeRegister(1.0)
    wakes.want(["f", "g"])
    wakes.keep({"g"})
    assert wakes.take_due(0.0) == ["g"]
    wakes.keep(set())
    wakes.want(["g"])
    assert wakes.take_due(0.1) == ["g"]


def test_another_control_process_is_asked_at_once() -> None:
    wakes = WakeRegister(1.0)
    wakes.want(["f"])
    wakes.take_due(0.0)
    wakes.forget_asked()
    wakes.want(["f"])
    assert wakes.take_due(0.1) == ["f"]
