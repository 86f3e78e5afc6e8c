"""Ejection, probes and return of addresses, on a clock that the tests advance."""

import copy

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from faasmoe_router.dispatch.endpoint_health import (
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
def detector() -> OutlierDetector:
    detector = OutlierDetector(SETTINGS)
    detector.retain({A, B, C, D})
    return detector


def test_unreachable_address_is_ejected_immediately(detector: OutlierDetector) -> None:
    detector.record_failure(A, Fault.UNREACHABLE, 7.0)
    assert detector.ejected == {A}
    assert detector.ejected_at_s(A) == 7.0
    assert detector.ejected_at_s(B) is None


def test_consecutive_errors_eject_unless_a_success_intervenes(
    detector: OutlierDetector,
) -> None:
    for _ in range(2):
        detector.record_failure(A, Fault.ERROR, 0.0)
        detector.record_failure(A, Fault.ERROR, 0.0)
        detector.record_success(A)
    assert not detector.ejected
    for _ in range(3):
        detector.record_failure(A, Fault.ERROR, 0.0)
    assert detector.ejected == {A}


def test_half_of_the_addresses_remain_when_all_are_slow(detector: OutlierDetector) -> None:
    for address in (A, B, C, D) * 3:
        detector.record_failure(address, Fault.TIMEOUT, 0.0)
    assert len(detector.ejected) == 2
    detector.record_failure(
        D, Fault.UNREACHABLE, 0.0
    )  # the limit does not apply to unreachable ones
    assert D in detector.ejected


def test_occasional_lost_hedges_do_not_eject(detector: OutlierDetector) -> None:
    for _ in range(10):
        for _ in range(3):
            detector.record_failure(A, Fault.LOST_HEDGE, 0.0)
        detector.record_success(A)
    assert not detector.ejected
    for _ in range(4):
        detector.record_failure(A, Fault.LOST_HEDGE, 0.0)
    assert detector.ejected == detector.last_resort == {A}
    detector.record_failure(A, Fault.TIMEOUT, 0.0)  # called as a last resort, it hung
    assert detector.ejected == {A}
    assert not detector.last_resort


def test_only_address_is_ejected_if_it_hangs() -> None:
    detector = OutlierDetector(SETTINGS)
    detector.retain({A})
    for _ in range(2):
        detector.record_failure(A, Fault.TIMEOUT, 0.0)
    assert detector.ejected == {A}


def test_probe_delay_doubles_until_a_probe_succeeds(
    detector: OutlierDetector,
) -> None:
    detector.record_failure(A, Fault.UNREACHABLE, 0.0)
    now_s, delays_s = 0.0, []
    for _ in range(6):
        started_s = now_s
        while not detector.due_for_probe(now_s):
            now_s += 0.1
        delays_s.append(round(now_s - started_s, 1))
        assert detector.due_for_probe(now_s) == []  # one probe at a time
        detector.record_probe(A, is_healthy=False, now_s=now_s)
    assert delays_s == pytest.approx([0.5, 1.0, 2.0, 4.0, 4.0, 4.0], abs=0.25)
    detector.record_probe(A, is_healthy=True, now_s=now_s)
    assert not detector.ejected


def test_address_that_fails_again_after_its_return_is_ejected_for_longer(
    detector: OutlierDetector,
) -> None:
    detector.record_failure(A, Fault.UNREACHABLE, 100.0)
    detector.record_probe(A, is_healthy=True, now_s=100.6)
    detector.record_failure(A, Fault.UNREACHABLE, 100.7)
    assert detector.due_for_probe(101.3) == []
    assert detector.due_for_probe(101.8) == [A]
    detector.record_probe(A, is_healthy=True, now_s=101.8)
    detector.record_failure(A, Fault.UNREACHABLE, 101.8 + SETTINGS.reset_after_s)
    assert detector.due_for_probe(102.4 + SETTINGS.reset_after_s) == [A]


def test_retain_forgets_other_addresses(detector: OutlierDetector) -> None:
    detector.record_failure(A, Fault.UNREACHABLE, 0.0)
    detector.retain({B})
    assert not detector.ejected
    detector.record_probe(A, is_healthy=False, now_s=1.0)
    assert detector.due_for_probe(99.0) == []


class DetectorMachine(RuleBasedStateMachine):
    """Ejected addresses are known, are probed in bounded time, and can return."""

    def __init__(self) -> None:
        super().__init__()
        self.detector = OutlierDetector(SETTINGS)
        self.known = {A, B, C, D}
        self.detector.retain(self.known)
        self.probing: set[str] = set()
        self.now_s = 0.0

    @rule(address=st.sampled_from([A, B, C, D]), fault=st.sampled_from(Fault))
    def fail(self, address: str, fault: Fault) -> None:
        if address in self.known:
            self.detector.record_failure(address, fault, self.now_s)

    @rule(address=st.sampled_from([A, B, C, D]))
    def succeed(self, address: str) -> None:
        self.detector.record_success(address)

    @rule(elapsed_s=st.floats(0.0, 10.0))
    def advance(self, elapsed_s: float) -> None:
        self.now_s += elapsed_s

    @rule()
    def start_probes(self) -> None:
        due = set(self.detector.due_for_probe(self.now_s))
        assert due <= self.detector.ejected - self.probing
        self.probing |= due

    @precondition(lambda self: self.probing)
    @rule(is_healthy=st.booleans())
    def finish_probe(self, is_healthy: bool) -> None:
        address = self.probing.pop()
        self.detector.record_probe(address, is_healthy=is_healthy, now_s=self.now_s)
        assert not (is_healthy and address in self.detector.ejected)

    @rule(known=st.sets(st.sampled_from([A, B, C, D])))
    def replace_known(self, known: set[str]) -> None:
        self.known = known
        self.detector.retain(known)
        self.probing &= known

    @invariant()
    def only_known_addresses_are_ejected(self) -> None:
        assert self.detector.ejected <= self.known

    @invariant()
    def each_is_probed_soon(self) -> None:
        later_s = self.now_s + SETTINGS.max_ejection_time_s
        due = copy.deepcopy(self.detector).due_for_probe(later_s)
        assert set(due) == self.detector.ejected - self.probing


TestDetectorMachine = DetectorMachine.TestCase
