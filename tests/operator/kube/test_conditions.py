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
    condition_false("Broken", "mend it"),
    condition_unknown("Coming", "wait"),
)


def built_condition(verdict: ConditionState, before: list[Object]) -> Object:
    (condition,) = build_conditions({READY: verdict}, before, generation=2, now=NOW)
    return condition


def test_a_condition_says_all_that_kubernetes_asks_for() -> None:
    assert built_condition(GOOD, []) == {
        "type": "Ready",
        "status": "True",
        "observedGeneration": 2,
        "lastTransitionTime": NOW,
        "reason": "Fine",
        "message": "well",
    }


def test_the_time_is_that_of_the_last_flip() -> None:
    before = [{"type": "Ready", "status": "False", "lastTransitionTime": THEN, "reason": "Other"}]
    assert built_condition(BAD, before)["lastTransitionTime"] == THEN
    assert built_condition(GOOD, before)["lastTransitionTime"] == NOW


def test_a_condition_without_a_time_gets_one() -> None:
    assert built_condition(BAD, [{"type": "Ready", "status": "False"}])["lastTransitionTime"] == NOW


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (ConditionStates(GOOD, GOOD, GOOD, GOOD, GOOD), ("True", "Ready")),
        (ConditionStates(GOOD, GOOD, GOOD, GOOD, active=BAD), ("True", "Ready")),
        (ConditionStates(GOOD, PENDING, GOOD, GOOD, GOOD), ("Unknown", "Coming")),
        (ConditionStates(PENDING, GOOD, GOOD, BAD, GOOD), ("False", "Broken")),
    ],
    ids=["all", "idle", "under-way", "wrong-before-under-way"],
)
def test_ready_sums_up_what_a_model_must_have(
    verdicts: ConditionStates, expected: tuple[str, str]
) -> None:
    verdict = summarize_ready(verdicts)
    assert (verdict.status, verdict.reason) == expected


def test_ready_says_which_part_is_meant() -> None:
    assert (
        summarize_ready(ConditionStates(GOOD, BAD, GOOD, GOOD, GOOD)).message
        == "RouterReady: mend it"
    )


def test_messages_are_bounded() -> None:
    assert len(condition_false("Broken", "x" * 10_000).message) == MAX_MESSAGE_CHARS + 1
