"""Absences of functions: one shared timeout, and requests at most once a second."""

import pytest

from faasmoe_router.dispatch.cold_start import FORGET_AFTER_S, AbsenceTracker


def test_function_that_is_not_missing_has_the_full_timeout() -> None:
    assert AbsenceTracker(2.0).remaining_s("f", 5.0) == 2.0


def test_all_calls_share_one_timeout_from_the_first_miss() -> None:
    absences = AbsenceTracker(2.0)
    absences.record_missing(["f", "g"], 10.0)
    absences.record_missing(["f"], 11.5)
    assert absences.remaining_s("f", 11.5) == pytest.approx(0.5)
    assert absences.remaining_s("g", 11.5) == pytest.approx(0.5)
    assert absences.remaining_s("f", 13.0) < 0


def test_timeout_restarts_after_the_function_has_responded() -> None:
    absences = AbsenceTracker(2.0)
    absences.record_missing(["f"], 10.0)
    absences.record_found("f")
    absences.record_found("never-missing")
    absences.record_missing(["f"], 20.0)
    assert absences.remaining_s("f", 20.0) == 2.0


def test_absence_starts_anew_when_it_was_not_met_for_long() -> None:
    absences = AbsenceTracker(2.0)
    absences.record_missing(["f"], 0.0)
    absences.record_missing(["f"], FORGET_AFTER_S)
    assert absences.remaining_s("f", FORGET_AFTER_S) < 0
    later_s = 2 * FORGET_AFTER_S + 1
    absences.record_missing(["f"], later_s)
    assert absences.remaining_s("f", later_s) == 2.0


def test_activation_is_requested_once_a_second() -> None:
    absences = AbsenceTracker(2.0)
    assert absences.record_missing(["f", "g"], 0.0) == ["f", "g"]
    assert absences.record_missing(["f", "g", "h"], 0.5) == ["h"]
    assert absences.record_missing(["f", "h"], 1.0) == ["f"]


def test_retain_forgets_all_other_functions() -> None:
    absences = AbsenceTracker(2.0)
    absences.record_missing(["f", "g"], 0.0)
    absences.retain(["f"])
    assert absences.remaining_s("f", 5.0) < 0
    assert absences.remaining_s("g", 5.0) == 2.0
