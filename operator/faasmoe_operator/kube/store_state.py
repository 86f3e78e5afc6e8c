"""How the store is doing: from its Job, the Job's pods and what the status remembers. Pure.

The Job's own retries are few and quick; a Job that has failed is replaced after a back-off that its
annotation counts, so that an operator that restarts goes on where the one before was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from faasmoe_operator.kube.actions import is_finished
from faasmoe_operator.kube.kinds import Object
from faasmoe_operator.kube.pod_trouble import trouble_of
from faasmoe_operator.kube.store_summary import (
    FailureReason,
    StoreFailure,
    StoreSummary,
    StoreSummaryError,
)
from faasmoe_operator.kube.verdict import Verdict, bad, good, pending

ATTEMPT_ANNOTATION = "faasmoe.dev/attempt"
RETRY_DELAYS_S = (10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)
FINAL_RETRY_DELAY_S = 3600.0

JOB_FAILED = "JobFailed"
SUMMARY_MISSING = "SummaryMissing"
FAILURES = frozenset({*(reason.value for reason in FailureReason), JOB_FAILED, SUMMARY_MISSING})
"""Reasons for which the Job is run again."""
HINTS = {
    "SourceNotFound": "check spec.model.source and spec.model.revision",
    "SourceUnsupported": "choose a model that the README lists as covered",
    "StoreMismatch": "give this MoEModel another claim, or another store.subPath in it",
    "HubUnauthorized": "name a Secret with a hub token that may read it in model.tokenSecretRef",
    "HubUnavailable": "check that the cluster's pods reach the hub",
    "NoSpace": "raise spec.store.size",
}


@dataclass(frozen=True, slots=True)
class StoreState:
    """What is known of a store.

    Attributes:
        verdict: state of the condition StoreReady.
        summary: what it holds; None unless it is ready.
        retry_at: when the failed Job is to be replaced, in seconds of the day's clock; None if
            there is nothing to replace.
        secret: a Secret that its pod waits for.
        is_retry: whether it failed before, and nothing is known yet of the new attempt.
    """

    verdict: Verdict
    summary: StoreSummary | None = None
    retry_at: float | None = None
    secret: str | None = None
    is_retry: bool = False


def store_state(job: Object | None, pods: Sequence[Object], *, known: Any) -> StoreState:
    """Return how the store is doing.

    Args:
        job: the store's Job, if there is one.
        pods: the Job's pods.
        known: `status.model` of the MoEModel, if it has one.
    """
    if job is None or "deletionTimestamp" in job["metadata"]:
        verdict = pending("Preparing", "the store's Job is about to begin")
        return StoreState(verdict, is_retry=True)
    if is_finished(job, "Complete"):
        return _prepared(job, _message(pods), known)
    if is_finished(job, "Failed"):
        return _failed(job, pods)
    if job.get("spec", {}).get("suspend"):
        return StoreState(pending("Suspended", "spec.suspend is true: the store is not prepared"))
    if (trouble := trouble_of(pods)) is not None:
        return StoreState(bad(trouble.reason, trouble.message), secret=trouble.secret)
    tried = "" if (message := _message(pods)) is None else f"; a try failed: {_said(message)}"
    verdict = pending("Preparing", f"Job {_name(job)} prepares the store{tried}")
    return StoreState(verdict, is_retry=attempt_of(job) > 0)


def attempt_of(job: Object) -> int:
    """Return how many Jobs failed before this one."""
    text = job["metadata"].get("annotations", {}).get(ATTEMPT_ANNOTATION, "")
    return int(text) if text.isascii() and text.isdecimal() else 0


def with_attempt(job: Object, attempt: int) -> Object:
    """Return a Job that says how many failed before it."""
    if attempt == 0:
        return job
    annotations = {**job["metadata"].get("annotations", {}), ATTEMPT_ANNOTATION: str(attempt)}
    return {**job, "metadata": {**job["metadata"], "annotations": annotations}}


def _prepared(job: Object, message: str | None, known: Any) -> StoreState:
    said = StoreSummary.from_termination_message(message) if message is not None else None
    summary = said if isinstance(said, StoreSummary) else _remembered(known)
    if summary is not None:
        text = f"{summary.source} is prepared, {summary.size_bytes} bytes, {summary.digest}"
        return StoreState(good("Prepared", text), summary)
    what = said.message if isinstance(said, StoreFailure) else "its pod is gone"
    verdict = bad(SUMMARY_MISSING, f"what the Job found is not known: {what}; it is run again")
    return StoreState(verdict, retry_at=_ended_at(job) + _delay_s(attempt_of(job)))


def _failed(job: Object, pods: Sequence[Object]) -> StoreState:
    attempt, message = attempt_of(job), _message(pods)
    failure = StoreSummary.from_termination_message(message) if message is not None else None
    trouble = trouble_of(pods)
    delay_s = _delay_s(attempt)
    if isinstance(failure, StoreFailure) and trouble is None:
        reason, text = failure.reason.value, failure.message
        delay_s = FINAL_RETRY_DELAY_S if failure.reason.is_final else delay_s
    elif trouble is not None:
        reason, text = trouble.reason, trouble.message
    else:
        reason, text = JOB_FAILED, _job_message(job)
    hint = f"; {HINTS[reason]}" if reason in HINTS else ""
    again = f"; tried again {_spoken(delay_s)} after it failed, or when Job {_name(job)} is deleted"
    verdict = bad(reason, f"{text}{hint}{again}")
    return StoreState(verdict, retry_at=_ended_at(job) + delay_s)


def _delay_s(attempt: int) -> float:
    return RETRY_DELAYS_S[min(attempt, len(RETRY_DELAYS_S) - 1)]


def _spoken(delay_s: float) -> str:
    return f"{delay_s:g} s" if delay_s < 120 else f"{delay_s / 60:g} min"


def _message(pods: Sequence[Object]) -> str | None:
    """Return the termination message of the container that ended last."""
    ended = [
        container["state"]["terminated"]
        for pod in pods
        for container in pod.get("status", {}).get("containerStatuses", ())
        if container.get("state", {}).get("terminated")
    ]
    if not ended:
        return None
    last = max(ended, key=lambda state: str(state.get("finishedAt") or ""))
    return str(last.get("message") or "")


def _said(message: str) -> str:
    result = StoreSummary.from_termination_message(message)
    return result.message if isinstance(result, StoreFailure) else "its result was lost"


def _remembered(known: Any) -> StoreSummary | None:
    if known is None:
        return None
    try:
        return StoreSummary.from_status(known)
    except StoreSummaryError:
        return None


def _job_message(job: Object) -> str:
    for condition in job.get("status", {}).get("conditions", ()):
        if condition.get("type") == "Failed":
            return f"Job {_name(job)}: {condition.get('message') or condition.get('reason')}"
    return f"Job {_name(job)} failed"


def _ended_at(job: Object) -> float:
    times = [
        condition["lastTransitionTime"]
        for condition in job.get("status", {}).get("conditions", ())
        if condition.get("type") in ("Failed", "Complete") and condition.get("lastTransitionTime")
    ]
    return datetime.fromisoformat(max(times)).timestamp() if times else 0.0


def _name(job: Object) -> str:
    name: str = job["metadata"]["name"]
    return name
