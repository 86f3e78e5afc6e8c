"""Ejection and return, as stories on a clock that the tests move."""

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from faasmoe_router.dispatch.outlier_detection import (
    Fault,
    OutlierDetectionSettings,
    OutlierDetector,
)

SETTINGS = OutlierDetectionSettings(
    consecutive_errors=3,
    consecutive_timeouts=2,
    base_ejection_time_s=0.5,
    max_ejection_time_s=4.0,
    reset_after_s=60.0,
)
A, B, C, D = "a:1", "b:1", "c:1", "d:1"


@pytest.fixture
def outliers() -> OutlierDetector:
    outliers = OutlierDetector(SETTINGS)
    outliers.retain({A, B, C, D})
    return outliers


def test_an_address_that_refuses_connections_is_ejected_at_once(outliers: OutlierDetector) -> None:
    outliers.record_failure(A, Fault.UNREACHABLE, 7.0)
    assert outliers.ejected == {A}
    assert outliers.ejected_at_s(A) == 7.0
    assert outliers.ejected_at_s(B) is None


def test_wrong_answers_in_a_row_eject_and_a_good_one_between_forgives(
    outliers: OutlierDetector,
) -> None:
    for _ in range(2):
        outliers.record_failure(A, Fault.ERROR, 0.0)
        outliers.record_failure(A, Fault.ERROR, 0.0)
        outliers.record_success(A)
    assert not outliers.ejected
    for _ in range(3):
        outliers.record_failure(A, Fault.ERROR, 0.0)
    assert outliers.ejected == {A}


def test_half_stay_when_everything_is_slow(outliers: OutlierDetector) -> None:
    for address in (A, B, C, D) * 3:
        outliers.record_failure(address, Fault.TIMEOUT, 0.0)
    assert len(outliers.ejected) == 2
    outliers.record_failure(D, Fault.UNREACHABLE, 0.0)  # but nobody is kept that is not there
    assert D in outliers.ejected


def test_to_be_overtaken_now_and_then_is_no_fault(outliers: OutlierDetector) -> None:
    for _ in range(10):
        for _ in range(3):
            outliers.record_failure(A, Fault.LOST_HEDGE, 0.0)
        outliers.record_success(A)
    assert not outliers.ejected
    for _ in range(4):
        outliers.record_failure(A, Fault.LOST_HEDGE, 0.0)
    assert outliers.ejected == outliers.last_resort == {A}
    outliers.record_failure(A, Fault.TIMEOUT, 0.0)  # asked all the same, it hung
    assert outliers.ejected == {A}
    assert not outliers.last_resort


def test_the_only_address_is_ejected_if_it_hangs() -> None:
    outliers = OutlierDetector(SETTINGS)
    outliers.retain({A})
    for _ in range(2):
        outliers.record_failure(A, Fault.TIMEOUT, 0.0)
    assert outliers.ejected == {A}


def test_probes_come_after_a_while_that_doubles_until_one_is_good(
    outliers: OutlierDetector,
) -> None:
    outliers.record_failure(A, Fault.UNREACHABLE, 0.0)
    now_s, waits_s = 0.0, []
    for _ in range(6):
        begun_s = now_s
        while not outliers.due_for_probe(now_s):
            now_s += 0.1
        waits_s.append(round(now_s - begun_s, 1))
        assert outliers.due_for_probe(now_s) == []  # one probe at a time
        outliers.record_probe(A, is_healthy=False, now_s=now_s)
    assert waits_s == pytest.approx([0.5, 1.0, 2.0, 4.0, 4.0, 4.0], abs=0.25)
    outliers.record_probe(A, is_healthy=True, now_s=now_s)
    assert not outliers.ejected


def test_one_that_returns_and_fails_again_is_left_alone_for_longer(
    outliers: OutlierDetector,
) -> None:
    outliers.record_failure(A, Fault.UNREACHABLE, 100.0)
    outliers.record_probe(A, is_healthy=True, now_s=100.6)
    outliers.record_failure(A, Fault.UNREACHABLE, 100.7)
    assert outliers.due_for_probe(101.3) == []
    assert outliers.due_for_probe(101.8) == [A]
    outliers.record_probe(A, is_healthy=True, now_s=101.8)
    outliers.record_failure(A, Fault.UNREACHABLE, 101.8 + SETTINGS.reset_after_s)
    assert outliers.due_for_probe(102.4 + SETTINGS.reset_after_s) == [A]


def test_an_address_that_left_the_table_is_forgotten(outliers: OutlierDetector) -> None:
    outliers.record_failure(A, Fault.UNREACHABLE, 0.0)
    outliers.retain({B})
    assert not outliers.ejected
    outliers.record_probe(A, is_healthy=False, now_s=1.0)
    assert outliers.due_for_probe(99.0) == []


class Story(RuleBasedStateMachine):
    """Whatever happens: what is ejected is known, is probed in bounded time, and can return."""

    def __init__(self) -> None:
        super().__init__()
        self.outliers = OutlierDetector(SETTINGS)
        self.known = {A, B, C, D}
        self.outliers.retain(self.known)
        self.asked: set[str] = set()
        self.now_s = 0.0

    @rule(address=st.sampled_from([A, B, C, D]), fault=st.sampled_from(Fault))
    def fail(self, address: str, fault: Fault) -> None:
        if address in self.known:
            self.outliers.record_failure(address, fault, self.now_s)

    @rule(address=st.sampled_from([A, B, C, D]))
    def succeed(self, address: str) -> None:
        self.outliers.record_success(address)

    @rule(passed_s=st.floats(0.0, 10.0))
    def pass_time(self, passed_s: float) -> None:
        self.now_s += passed_s

    @rule()
    def ask(self) -> None:
        due = set(self.outliers.due_for_probe(self.now_s))
        assert due <= self.outliers.ejected - self.asked
        self.asked |= due

    @precondition(lambda self: self.asked)
    @rule(is_well=st.booleans())
    def answer(self, is_well: bool) -> None:
        address = self.asked.pop()
        self.outliers.record_probe(address, is_healthy=is_well, now_s=self.now_s)
        assert not (is_well and address in self.outliers.ejected)

    @rule(known=st.sets(st.sampled_from([A, B, C, D])))
    def move(self, known: set[str]) -> None:
        self.known = known
        self.outliers.retain(known)
        self.asked &= known

    @invariant()
    def only_known_addresses_are_ejected(self) -> None:
        assert self.outliers.ejected <= self.known

    @invariant()
    def each_is_probed_soon(self) -> None:
        waiting = self.outliers.ejected - self.asked
        for address in waiting:
            record = self.outliers._states[address]
            assert record.next_probe_s <= self.now_s + SETTINGS.max_ejection_time_s


TestStory = Story.TestCase
