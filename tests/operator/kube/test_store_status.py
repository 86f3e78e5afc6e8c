import json
from typing import Any

import pytest
from kube_objects import make_object

from faasmoe_operator.kube.store_status import (
    FINAL_RETRY_DELAY_S,
    RETRY_DELAYS_S,
    failed_attempts,
    store_status,
    with_failed_attempts,
)
from faasmoe_operator.kube.types import JOB, POD, Object

ENDED_AT = 1_788_000_000.0
ENDED = "2026-08-29T10:40:00Z"
SUMMARY: dict[str, Any] = {
    "digest": "sha256:0",
    "source": "hf://org/moe",
    "family": "mixtral",
    "architecture": "MixtralForCausalLM",
    "dtype": "bfloat16",
    "hiddenSize": 8,
    "vocabSize": 8,
    "maxPositionEmbeddings": 8,
    "numHiddenLayers": 1,
    "sizeBytes": 8,
    "routerBytes": 8,
    "layers": [{"count": 1, "numExperts": 2, "topK": 1, "expertBytes": 8, "sharedBytes": 0}],
}


def a_job(how: str | None = None, *, attempt: int = 0, **spec: Any) -> Object:
    ends = [{"type": how, "status": "True", "lastTransitionTime": ENDED, "message": "limit"}]
    status = {"conditions": ends if how else []}
    return with_failed_attempts(make_object(JOB, "moe-store", spec=spec, status=status), attempt)


def a_pod(message: str, *, finished_at: str = ENDED, **terminated: Any) -> Object:
    ended = {"message": message, "finishedAt": finished_at, **terminated}
    return make_object(POD, "p", status={"containerStatuses": [{"state": {"terminated": ended}}]})


def failure(reason: str) -> Object:
    return a_pod(json.dumps({"ok": False, "reason": reason, "message": "why"}))


PREPARED = a_pod(json.dumps({"ok": True, **SUMMARY}))
PULLING = make_object(
    POD, "p", status={"containerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull"}}}]}
)


@pytest.mark.parametrize(
    ("job", "pods", "known", "expected"),
    [
        pytest.param(None, [], None, ("Unknown", "Preparing"), id="no-job-yet"),
        pytest.param(a_job(), [], None, ("Unknown", "Preparing"), id="running"),
        pytest.param(a_job(suspend=True), [], None, ("Unknown", "Suspended"), id="suspended"),
        pytest.param(a_job(), [PULLING], None, ("False", "ImagePullBackOff"), id="trouble"),
        pytest.param(a_job("Complete"), [PREPARED], None, ("True", "Prepared"), id="prepared"),
        pytest.param(a_job("Complete"), [], SUMMARY, ("True", "Prepared"), id="remembered"),
        pytest.param(
            a_job("Complete"), [a_pod("{}")], SUMMARY, ("True", "Prepared"), id="damaged-message"
        ),
        pytest.param(
            a_job("Complete"), [], None, ("False", "TerminationMessageMissing"), id="lost"
        ),
        pytest.param(
            a_job("Complete"),
            [],
            {"digest": 1},
            ("False", "TerminationMessageMissing"),
            id="unreadable",
        ),
        pytest.param(
            a_job("Failed"),
            [failure("SourceNotFound")],
            SUMMARY,
            ("False", "SourceNotFound"),
            id="failed",
        ),
        pytest.param(a_job("Failed"), [], None, ("False", "JobFailed"), id="failed-without-a-word"),
        pytest.param(
            a_job("Failed"),
            [a_pod("", reason="OOMKilled", exitCode=137)],
            None,
            ("False", "OOMKilled"),
            id="killed",
        ),
    ],
)
def test_says_how_the_store_is_doing(
    job: Object | None, pods: list[Object], known: Any, expected: tuple[str, str]
) -> None:
    state = store_status(job, pods, status_model=known)
    assert (state.condition.status, state.condition.reason) == expected
    assert (state.summary is not None) is (expected[0] == "True")


def test_a_job_that_goes_is_none() -> None:
    job = a_job("Complete")
    job["metadata"]["deletionTimestamp"] = ENDED
    assert store_status(job, [PREPARED], status_model=None).condition.reason == "Preparing"


def test_the_last_pod_is_believed() -> None:
    older = failure("HubUnavailable")
    newer = a_pod(
        json.dumps({"ok": False, "reason": "NoSpace", "message": "full"}),
        finished_at="2026-08-29T11:00:00Z",
    )
    verdict = store_status(a_job("Failed"), [newer, older], status_model=None).condition
    assert verdict.reason == "NoSpace"
    assert "full; raise spec.store.size" in verdict.message


@pytest.mark.parametrize("attempt", [0, 1, 6, 50])
def test_tries_again_later_with_each_attempt(attempt: int) -> None:
    state = store_status(
        a_job("Failed", attempt=attempt), [failure("HubUnavailable")], status_model=None
    )
    delay_s = RETRY_DELAYS_S[min(attempt, len(RETRY_DELAYS_S) - 1)]
    assert state.retry_at == ENDED_AT + delay_s


@pytest.mark.parametrize("reason", ["SourceUnsupported", "StoreMismatch"])
def test_seldom_tries_again_what_will_not_help(reason: str) -> None:
    state = store_status(a_job("Failed"), [failure(reason)], status_model=None)
    assert state.retry_at == ENDED_AT + FINAL_RETRY_DELAY_S
    assert "60 min after it failed, or when Job moe-store is deleted" in state.condition.message


def test_runs_a_job_again_whose_summary_is_lost() -> None:
    assert store_status(a_job("Complete"), [], status_model=None).retry_at is not None


def test_tells_of_a_try_that_failed_while_the_job_goes_on() -> None:
    verdict = store_status(a_job(), [failure("HubUnavailable")], status_model=None).condition
    assert verdict.message == "Job moe-store prepares the store; the last attempt failed: why"


@pytest.mark.parametrize("text", ["", "x", "-1", "٣"])
def test_an_unreadable_count_of_attempts_is_none(text: str) -> None:
    job = make_object(JOB, "moe-store")
    job["metadata"]["annotations"] = {"faasmoe.dev/attempt": text}
    assert failed_attempts(job) == 0


def test_counts_attempts_in_an_annotation() -> None:
    job = make_object(JOB, "moe-store")
    assert with_failed_attempts(job, 0) == job
    assert failed_attempts(with_failed_attempts(job, 3)) == 3
