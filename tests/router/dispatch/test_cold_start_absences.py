import pytest

from faasmoe_router.dispatch.cold_start import FORGET_AFTER_S, AbsenceTracker


def test_a_function_that_is_not_missed_may_be_waited_for() -> None:
    assert AbsenceTracker(2.0).remaining_s("f", 5.0) == 2.0


def test_all_calls_share_one_allowance_from_the_first_miss_on() -> None:
    patience = AbsenceTracker(2.0)
    patience.record_missing(["f", "g"], 10.0)
    patience.record_missing(["f"], 11.5)
    assert patience.remaining_s("f", 11.5) == pytest.approx(0.5)
    assert patience.remaining_s("g", 11.5) == pytest.approx(0.5)
    assert patience.remaining_s("f", 13.0) < 0


def test_a_function_that_answered_gets_a_new_allowance() -> None:
    patience = AbsenceTracker(2.0)
    patience.record_missing(["f"], 10.0)
    patience.record_found("f")
    patience.record_found("never missed")
    patience.record_missing(["f"], 20.0)
    assert patience.remaining_s("f", 20.0) == 2.0


def test_an_absence_that_nobody_met_for_long_is_a_new_one() -> None:
    patience = AbsenceTracker(2.0)
    patience.record_missing(["f"], 0.0)
    patience.record_missing(["f"], FORGET_AFTER_S)
    assert patience.remaining_s("f", FORGET_AFTER_S) < 0
    later_s = 2 * FORGET_AFTER_S + 1
    patience.record_missing(["f"], later_s)
    assert patience.remaining_s("f", later_s) == 2.0


def test_functions_are_asked_for_once_a_second() -> None:
    patience = AbsenceTracker(2.0)
    assert patience.record_missing(["f", "g"], 0.0) == ["f", "g"]
    assert patience.record_missing(["f", "g", "h"], 0.5) == ["h"]
    assert patience.record_missing(["f", "h"], 1.0) == ["f"]


def test_only_functions_of_the_table_are_remembered() -> None:
    patience = AbsenceTracker(2.0)
    patience.record_missing(["f", "g"], 0.0)
    patience.retain(["f"])
    assert patience.remaining_s("f", 5.0) < 0
    assert patience.remaining_s("g", 5.0) == 2.0
