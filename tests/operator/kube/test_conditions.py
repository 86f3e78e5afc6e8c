import pytest

from faasmoe_operator.kube.conditions import (
    MAX_MESSAGE_CHARS,
    READY,
    ConditionState,
    ConditionStates,
    build_conditions,
    condition_false,
    condition_true,
    condition_unknown,
    summarize_ready,
)
from faasmoe_operator.kube.types import Object

THEN, NOW = "2026-09-01T12:00:00Z", "2026-09-01T12:05:00Z"
GOOD, BAD, PENDING = (
    condition_true("Fine", "well"),
    condition_false("Broken", "fix it"),
    condition_unknown("Coming", "wait"),
)


def built_condition(state: ConditionState, previous: list[Object]) -> Object:
    (condition,) = build_conditions({READY: state}, previous, generation=2, now=NOW)
    return condition


def test_a_condition_has_all_standard_fields() -> None:
    assert built_condition(GOOD, []) == {
        "type": "Ready",
        "status": "True",
        "observedGeneration": 2,
        "lastTransitionTime": NOW,
        "reason": "Fine",
        "message": "well",
    }


def test_transition_time_changes_only_with_the_status() -> None:
    previous = [{"type": "Ready", "status": "False", "lastTransitionTime": THEN, "reason": "Other"}]
    assert built_condition(BAD, previous)["lastTransitionTime"] == THEN
    assert built_condition(GOOD, previous)["lastTransitionTime"] == NOW


def test_a_condition_without_a_transition_time_gets_one() -> None:
    assert built_condition(BAD, [{"type": "Ready", "status": "False"}])["lastTransitionTime"] == NOW


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (ConditionStates(GOOD, GOOD, GOOD, GOOD, GOOD), ("True", "Ready")),
        (ConditionStates(GOOD, GOOD, GOOD, GOOD, active=BAD), ("True", "Ready")),
        (ConditionStates(GOOD, PENDING, GOOD, GOOD, GOOD), ("Unknown", "Coming")),
        (ConditionStates(PENDING, GOOD, BAD, GOOD, GOOD), ("False", "Broken")),
        (ConditionStates(GOOD, GOOD, GOOD, tenants=BAD, active=GOOD), ("True", "Ready")),
    ],
    ids=["all", "idle", "in-progress", "false-before-unknown", "tenant-without-key"],
)
def test_ready_summarizes_the_dependent_conditions(
    states: ConditionStates, expected: tuple[str, str]
) -> None:
    state = summarize_ready(states)
    assert (state.status, state.reason) == expected


def test_ready_message_names_the_failing_condition() -> None:
    assert (
        summarize_ready(ConditionStates(GOOD, BAD, GOOD, GOOD, GOOD)).message
        == "RouterReady: fix it"
    )


def test_long_messages_are_truncated() -> None:
    for make in (condition_true, condition_false, condition_unknown):
        assert len(make("Any", "x" * 10_000).message) == MAX_MESSAGE_CHARS + 1
