"""Status of a model's store, from its Job, the Job's pods and `status.model`. Pure.

The Job's own retries are few and quick. A failed Job is replaced after a back-off; the number of
attempts is kept in an annotation, so that the back-off survives a restart of the operator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from types import MappingProxyType
from typing import Any

from faasmoe_operator.kube.component_status import PodFailure, first_pod_failure
from faasmoe_operator.kube.conditions import (
    ConditionState,
    condition_false,
    condition_true,
    condition_unknown,
)
from faasmoe_operator.kube.diff import has_job_condition
from faasmoe_operator.kube.store_summary import (
    StoreFailure,
    StoreFailureReason,
    StoreSummary,
    StoreSummaryError,
)
from faasmoe_operator.kube.types import Object

ATTEMPT_ANNOTATION = "faasmoe.dev/attempt"
RETRY_DELAYS_S = (10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
FINAL_RETRY_DELAY_S = 3600.0

JOB_FAILED = "JobFailed"
RESULT_MISSING = "TerminationMessageMissing"
RETRYABLE_REASONS = frozenset(
    {*(reason.value for reason in StoreFailureReason), JOB_FAILED, RESULT_MISSING}
)
"""Reasons of a failed Job, which is run again."""
HINTS = {
    "SourceNotFound": "check spec.model.source and spec.model.revision",
    "SourceUnsupported": "choose a model that the README lists as covered",
    "StoreMismatch": "give this MoEModel another claim, or another store.subPath in it",
    "HubUnauthorized": "name a Secret with a hub token that may read it in model.tokenSecretRef",
    "HubUnavailable": "check that the cluster's pods reach the hub",
    "NoSpace": "raise spec.store.size",
}


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """Status of a store.

    Attributes:
        condition: state of StoreReady.
        summary: the store's content; None unless it is ready.
        retry_at: when to replace a failed Job, in Unix time; None if there is nothing to replace.
        missing_secret: name of a Secret that a pod waits for; None if none waits.
        is_retry: whether an earlier attempt failed and the new one has no result yet.
    """

    condition: ConditionState
    summary: StoreSummary | None = None
    retry_at: float | None = None
    missing_secret: str | None = None
    is_retry: bool = False


def store_status(
    job: Object | None,
    pods: Sequence[Object],
    *,
    status_model: Any,
    wall_clock_s: float,
    names_by_path: Mapping[str, str] = MappingProxyType({}),
) -> StoreStatus:
    """Return the status of the store.

    Args:
        job: the store Job; None if it does not exist.
        pods: the Job's pods.
        status_model: the MoEModel's current `status.model`; None if it has none.
        wall_clock_s: Unix time, in seconds.
        names_by_path: for paths in the Job's pod, what the spec calls them; messages name these.
    """
    pod_failure = first_pod_failure(pods, wall_clock_s=wall_clock_s)
    state = _store_status(job, pods, status_model, pod_failure)
    message = state.condition.message
    for path, name in names_by_path.items():
        message = message.replace(path, name)
    return replace(state, condition=replace(state.condition, message=message))


def _store_status(
    job: Object | None,
    pods: Sequence[Object],
    status_model: Any,
    pod_failure: PodFailure | None,
) -> StoreStatus:
    if job is None or "deletionTimestamp" in job["metadata"]:
        condition = condition_unknown("Preparing", "creating the store Job")
        return StoreStatus(condition, is_retry=True)
    if has_job_condition(job, "Complete"):
        return _completed_status(job, _termination_message(pods), status_model)
    if has_job_condition(job, "Failed"):
        return _failed_status(job, pods, pod_failure)
    if job.get("spec", {}).get("suspend"):
        return StoreStatus(
            condition_unknown("Suspended", "spec.suspend is true: the store is not prepared")
        )
    if pod_failure is not None:
        return StoreStatus(
            condition_false(pod_failure.reason, pod_failure.message),
            missing_secret=pod_failure.missing_secret,
        )
    if (message := _termination_message(pods)) is not None:
        return StoreStatus(_failed_attempt(job, message))
    condition = condition_unknown("Preparing", f"Job {_job_name(job)} prepares the store")
    return StoreStatus(condition, is_retry=failed_attempts(job) > 0)


def _failed_attempt(job: Object, message: str) -> ConditionState:
    """Return the state of a Job that goes on after an attempt with this termination message."""
    result = StoreSummary.from_termination_message(message)
    if isinstance(result, StoreSummary):  # the Job is about to be complete
        return condition_unknown("Preparing", f"Job {_job_name(job)} ends")
    text = f"{result.message}{_hint(result.reason.value)}"
    return condition_false(result.reason.value, f"{text}; Job {_job_name(job)} tries again")


def failed_attempts(job: Object) -> int:
    """Return how many Jobs failed before this one, from its annotation."""
    text = job["metadata"].get("annotations", {}).get(ATTEMPT_ANNOTATION, "")
    return int(text) if text.isascii() and text.isdecimal() else 0


def with_failed_attempts(job: Object, attempt: int) -> Object:
    """Return a Job with the number of earlier failures in an annotation."""
    if attempt == 0:
        return job
    annotations = {**job["metadata"].get("annotations", {}), ATTEMPT_ANNOTATION: str(attempt)}
    return {**job, "metadata": {**job["metadata"], "annotations": annotations}}


def _completed_status(job: Object, message: str | None, status_model: Any) -> StoreStatus:
    result = StoreSummary.from_termination_message(message) if message is not None else None
    summary = result if isinstance(result, StoreSummary) else _summary_from_status(status_model)
    if summary is not None:
        text = f"{summary.source} is prepared, {summary.size_bytes} bytes, {summary.digest}"
        return StoreStatus(condition_true("Prepared", text), summary)
    cause = result.message if isinstance(result, StoreFailure) else "its pod is gone"
    condition = condition_false(
        RESULT_MISSING, f"the Job's termination message is missing: {cause}; it is run again"
    )
    return StoreStatus(condition, retry_at=_finished_at(job) + _retry_delay_s(failed_attempts(job)))


def _failed_status(
    job: Object, pods: Sequence[Object], pod_failure: PodFailure | None
) -> StoreStatus:
    attempt, message = failed_attempts(job), _termination_message(pods)
    failure = StoreSummary.from_termination_message(message) if message is not None else None
    delay_s = _retry_delay_s(attempt)
    if isinstance(failure, StoreFailure) and pod_failure is None:
        reason, text = failure.reason.value, failure.message
        delay_s = FINAL_RETRY_DELAY_S if failure.reason.is_permanent else delay_s
    elif pod_failure is not None:
        reason, text = pod_failure.reason, pod_failure.message
    else:
        reason, text = JOB_FAILED, _job_message(job)
    when = f"{_format_delay(delay_s)} after the failure, or when Job {_job_name(job)} is deleted"
    condition = condition_false(reason, f"{text}{_hint(reason)}; retried {when}")
    return StoreStatus(condition, retry_at=_finished_at(job) + delay_s)


def _hint(reason: str) -> str:
    return f"; {HINTS[reason]}" if reason in HINTS else ""


def _retry_delay_s(attempt: int) -> float:
    return RETRY_DELAYS_S[min(attempt, len(RETRY_DELAYS_S) - 1)]


def _format_delay(delay_s: float) -> str:
    return f"{delay_s:g} s" if delay_s < 120 else f"{delay_s / 60:g} min"


def _termination_message(pods: Sequence[Object]) -> str | None:
    """Return the termination message of the container that terminated last."""
    terminated = [
        container["state"]["terminated"]
        for pod in pods
        for container in pod.get("status", {}).get("containerStatuses", ())
        if container.get("state", {}).get("terminated")
    ]
    if not terminated:
        return None
    last = max(terminated, key=lambda state: str(state.get("finishedAt") or ""))
    return str(last.get("message") or "")


def _summary_from_status(status_model: Any) -> StoreSummary | None:
    if status_model is None:
        return None
    try:
        return StoreSummary.from_status(status_model)
    except StoreSummaryError:
        return None


def _job_message(job: Object) -> str:
    for condition in job.get("status", {}).get("conditions", ()):
        if condition.get("type") == "Failed":
            return f"Job {_job_name(job)}: {condition.get('message') or condition.get('reason')}"
    return f"Job {_job_name(job)} failed"


def _finished_at(job: Object) -> float:
    times = [
        condition["lastTransitionTime"]
        for condition in job.get("status", {}).get("conditions", ())
        if condition.get("type") in ("Failed", "Complete") and condition.get("lastTransitionTime")
    ]
    return datetime.fromisoformat(max(times)).timestamp() if times else 0.0


def _job_name(job: Object) -> str:
    name: str = job["metadata"]["name"]
    return name
