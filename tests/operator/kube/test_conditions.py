import pytest

from faasmoe_operator.kube.conditions import READY, Verdicts, conditions, summed_up
from faasmoe_operator.kube.kinds import Object
from faasmoe_operator.kube.verdict import MAX_MESSAGE_CHARS, Verdict, bad, good, pending

THEN, NOW = "2026-09-01T12:00:00Z", "2026-09-01T12:05:00Z"
GOOD, BAD, PENDING = good("Fine", "well"), bad("Broken", "mend it"), pending("Coming", "wait")


def told(verdict: Verdict, before: list[Object]) -> Object:
    (condition,) = conditions({READY: verdict}, before, generation=2, now=NOW)
    return condition


def test_a_condition_says_all_that_kubernetes_asks_for() -> None:
    assert told(GOOD, []) == {
        "type": "Ready",
        "status": "True",
        "observedGeneration": 2,
        "lastTransitionTime": NOW,
        "reason": "Fine",
        "message": "well",
    }


def test_the_time_is_that_of_the_last_flip() -> None:
    before = [{"type": "Ready", "status": "False", "lastTransitionTime": THEN, "reason": "Other"}]
    assert told(BAD, before)["lastTransitionTime"] == THEN
    assert told(GOOD, before)["lastTransitionTime"] == NOW


def test_a_condition_without_a_time_gets_one() -> None:
    assert told(BAD, [{"type": "Ready", "status": "False"}])["lastTransitionTime"] == NOW


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (Verdicts(GOOD, GOOD, GOOD, GOOD, GOOD), ("True", "Ready")),
        (Verdicts(GOOD, GOOD, GOOD, GOOD, active=BAD), ("True", "Ready")),
        (Verdicts(GOOD, PENDING, GOOD, GOOD, GOOD), ("Unknown", "Coming")),
        (Verdicts(PENDING, GOOD, GOOD, BAD, GOOD), ("False", "Broken")),
    ],
    ids=["all", "idle", "under-way", "wrong-before-under-way"],
)
def test_ready_sums_up_what_a_model_must_have(
    verdicts: Verdicts, expected: tuple[str, str]
) -> None:
    verdict = summed_up(verdicts)
    assert (verdict.status, verdict.reason) == expected


def test_ready_says_which_part_is_meant() -> None:
    assert summed_up(Verdicts(GOOD, BAD, GOOD, GOOD, GOOD)).message == "RouterReady: mend it"


def test_messages_are_bounded() -> None:
    assert len(bad("Broken", "x" * 10_000).message) == MAX_MESSAGE_CHARS + 1
