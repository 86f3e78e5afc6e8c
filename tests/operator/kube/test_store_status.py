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


def make_job(condition_type: str | None = None, *, attempt: int = 0, **spec: Any) -> Object:
    conditions = [
        {"type": condition_type, "status": "True", "lastTransitionTime": ENDED, "message": "limit"}
    ]
    status = {"conditions": conditions if condition_type else []}
    return with_failed_attempts(make_object(JOB, "moe-store", spec=spec, status=status), attempt)


def make_pod(message: str, *, finished_at: str = ENDED, **terminated: Any) -> Object:
    ended = {"message": message, "finishedAt": finished_at, **terminated}
    return make_object(POD, "p", status={"containerStatuses": [{"state": {"terminated": ended}}]})


def failure(reason: str) -> Object:
    return make_pod(json.dumps({"ok": False, "reason": reason, "message": "why"}))


PREPARED = make_pod(json.dumps({"ok": True, **SUMMARY}))
PULLING = make_object(
    POD, "p", status={"containerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull"}}}]}
)


@pytest.mark.parametrize(
    ("job", "pods", "known", "expected"),
    [
        pytest.param(None, [], None, ("Unknown", "Preparing"), id="no-job"),
        pytest.param(make_job(), [], None, ("Unknown", "Preparing"), id="running"),
        pytest.param(make_job(suspend=True), [], None, ("Unknown", "Suspended"), id="suspended"),
        pytest.param(make_job(), [PULLING], None, ("False", "ImagePullBackOff"), id="pod-failure"),
        pytest.param(make_job("Complete"), [PREPARED], None, ("True", "Prepared"), id="prepared"),
        pytest.param(make_job("Complete"), [], SUMMARY, ("True", "Prepared"), id="from-status"),
        pytest.param(
            make_job("Complete"),
            [make_pod("{}")],
            SUMMARY,
            ("True", "Prepared"),
            id="invalid-message",
        ),
        pytest.param(
            make_job("Complete"),
            [],
            None,
            ("False", "TerminationMessageMissing"),
            id="lost-message",
        ),
        pytest.param(
            make_job("Complete"),
            [],
            {"digest": 1},
            ("False", "TerminationMessageMissing"),
            id="invalid-message-and-status",
        ),
        pytest.param(
            make_job("Failed"),
            [failure("SourceNotFound")],
            SUMMARY,
            ("False", "SourceNotFound"),
            id="failed",
        ),
        pytest.param(
            make_job("Failed"), [], None, ("False", "JobFailed"), id="failed-without-message"
        ),
        pytest.param(
            make_job("Failed"),
            [make_pod("", reason="OOMKilled", exitCode=137)],
            None,
            ("False", "OOMKilled"),
            id="killed",
        ),
    ],
)
def test_store_status_by_job_and_pods(
    job: Object | None, pods: list[Object], known: Any, expected: tuple[str, str]
) -> None:
    state = store_status(job, pods, status_model=known, wall_clock_s=ENDED_AT)
    assert (state.condition.status, state.condition.reason) == expected
    assert (state.summary is not None) is (expected[0] == "True")


def test_a_terminating_job_counts_as_missing() -> None:
    job = make_job("Complete")
    job["metadata"]["deletionTimestamp"] = ENDED
    assert (
        store_status(job, [PREPARED], status_model=None, wall_clock_s=ENDED_AT).condition.reason
        == "Preparing"
    )


def test_uses_the_last_termination_message() -> None:
    older = failure("HubUnavailable")
    newer = make_pod(
        json.dumps({"ok": False, "reason": "NoSpace", "message": "full"}),
        finished_at="2026-08-29T11:00:00Z",
    )
    condition = store_status(
        make_job("Failed"), [newer, older], status_model=None, wall_clock_s=ENDED_AT
    ).condition
    assert condition.reason == "NoSpace"
    assert "full; raise spec.store.size" in condition.message


@pytest.mark.parametrize("attempt", [0, 1, 6, 50])
def test_retry_delay_grows_with_each_attempt(attempt: int) -> None:
    state = store_status(
        make_job("Failed", attempt=attempt),
        [failure("HubUnavailable")],
        status_model=None,
        wall_clock_s=ENDED_AT,
    )
    delay_s = RETRY_DELAYS_S[min(attempt, len(RETRY_DELAYS_S) - 1)]
    assert state.retry_at == ENDED_AT + delay_s


@pytest.mark.parametrize("reason", ["SourceUnsupported", "StoreMismatch"])
def test_permanent_failures_are_retried_rarely(reason: str) -> None:
    state = store_status(
        make_job("Failed"), [failure(reason)], status_model=None, wall_clock_s=ENDED_AT
    )
    assert state.retry_at == ENDED_AT + FINAL_RETRY_DELAY_S
    assert "60 min after the failure, or when Job moe-store is deleted" in state.condition.message


def test_a_job_without_a_summary_is_run_again() -> None:
    assert (
        store_status(make_job("Complete"), [], status_model=None, wall_clock_s=ENDED_AT).retry_at
        is not None
    )


def test_reports_a_failed_attempt_while_the_job_continues() -> None:
    state = store_status(
        make_job(), [failure("HubUnavailable")], status_model=None, wall_clock_s=ENDED_AT
    )
    assert (state.condition.status, state.condition.reason) == ("False", "HubUnavailable")
    assert state.condition.message == (
        "why; check that the cluster's pods reach the hub; Job moe-store tries again"
    )
    assert state.retry_at is None


def test_a_job_whose_attempt_succeeded_is_no_failure() -> None:
    assert (
        store_status(
            make_job(), [PREPARED], status_model=None, wall_clock_s=ENDED_AT
        ).condition.status
        == "Unknown"
    )


def test_messages_name_what_the_spec_names() -> None:
    message = "source: got '/source/claim/qwen', expected a folder; store: /store/qwen is locked"
    ended = make_pod(json.dumps({"ok": False, "reason": "SourceNotFound", "message": message}))
    names = {"/source/claim/qwen": "pvc://claim/qwen", "/store/qwen": "qwen-store/qwen"}
    for job in (make_job(), make_job("Failed")):
        state = store_status(
            job, [ended], status_model=None, wall_clock_s=ENDED_AT, names_by_path=names
        )
        assert "got 'pvc://claim/qwen', expected a folder" in state.condition.message
        assert "store: qwen-store/qwen is locked" in state.condition.message
        assert "/source" not in state.condition.message


@pytest.mark.parametrize("text", ["", "x", "-1", "٣"])
def test_an_invalid_attempt_annotation_counts_as_zero(text: str) -> None:
    job = make_object(JOB, "moe-store")
    job["metadata"]["annotations"] = {"faasmoe.dev/attempt": text}
    assert failed_attempts(job) == 0


def test_counts_attempts_in_an_annotation() -> None:
    job = make_object(JOB, "moe-store")
    assert with_failed_attempts(job, 0) == job
    assert failed_attempts(with_failed_attempts(job, 3)) == 3
