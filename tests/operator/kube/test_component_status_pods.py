from typing import Any

import pytest
from kube_objects import make_object

from faasmoe_operator.kube.component_status import (
    PROVISIONING_GRACE_S,
    find_pod_failure,
    first_pod_failure,
    next_pod_failure_at,
)
from faasmoe_operator.kube.types import POD, Object

NOW = 1_788_000_000.0
SINCE = "2026-08-29T10:40:00Z"
"""NOW, as the API server writes it."""


def make_pod(name: str = "p", **status: Any) -> Object:
    return make_object(POD, name, status=status)


def waiting(reason: str, message: str = "", **rest: Any) -> Object:
    state = {"waiting": {"reason": reason, "message": message}}
    container = {"name": "c", "image": "registry/i:1", "state": state, **rest}
    return make_pod(phase="Pending", containerStatuses=[container])


def unscheduled(message: str, **condition_fields: str) -> Object:
    condition = {"type": "PodScheduled", "status": "False", "message": message, **condition_fields}
    return make_pod(phase="Pending", conditions=[condition])


NO_MEMORY = "0/3 nodes are available: 3 Insufficient memory."
UNBOUND = "pod has unbound immediate PersistentVolumeClaims."
CRASHED = {"terminated": {"exitCode": 1, "message": "Traceback\nValueError: no such file"}}
OOM_KILLED = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}


@pytest.mark.parametrize(
    ("pod", "reason", "expected_message"),
    [
        (unscheduled(NO_MEMORY), "Unschedulable", "3 Insufficient memory; add nodes or"),
        (unscheduled(UNBOUND), "Unschedulable", "`kubectl describe pvc`"),
        (
            waiting("CreateContainerConfigError", 'secret "hub" not found'),
            "SecretNotFound",
            "no Secret hub in its namespace; create it",
        ),
        (
            waiting("CreateContainerConfigError", "couldn't find key token in Secret llm/hub"),
            "SecretKeyNotFound",
            "Secret hub has no key token; add it",
        ),
        (
            waiting("CreateContainerConfigError", "configmap not found"),
            "CreateContainerConfigError",
            "configmap not found",
        ),
        (waiting("ErrImagePull", "no such host"), "ImagePullBackOff", "registry/i:1"),
        (waiting("InvalidImageName"), "ImagePullBackOff", "imagePullSecrets"),
        (waiting("RunContainerError", "no nvidia"), "ContainerCannotRun", "no nvidia"),
        (
            waiting("CrashLoopBackOff", lastState=CRASHED),
            "CrashLoopBackOff",
            "ended with status 1: ValueError: no such file; see `kubectl logs p`",
        ),
        (waiting("CrashLoopBackOff", lastState=OOM_KILLED), "OOMKilled", "ask for more memory"),
        (
            make_pod(phase="Failed", reason="Evicted", message="The node was low on disk"),
            "Evicted",
            "low on disk",
        ),
    ],
)
def test_finds_why_a_pod_does_not_run(pod: Object, reason: str, expected_message: str) -> None:
    failure = find_pod_failure(pod, wall_clock_s=NOW)
    assert failure is not None
    assert failure.reason == reason
    assert expected_message in failure.message


@pytest.mark.parametrize(
    "pod",
    [
        pytest.param(make_pod(), id="no-status-yet"),
        pytest.param(waiting("ContainerCreating"), id="starting"),
        pytest.param(waiting("PodInitializing"), id="initializing"),
        pytest.param(make_pod(phase="Running", containerStatuses=[{"state": {}}]), id="running"),
        pytest.param(make_pod(phase="Failed"), id="failed-by-itself"),
    ],
)
def test_a_healthy_pod_has_no_failure(pod: Object) -> None:
    assert find_pod_failure(pod, wall_clock_s=NOW) is None


def test_a_terminating_pod_has_no_failure() -> None:
    pod = waiting("ErrImagePull")
    pod["metadata"]["deletionTimestamp"] = "2026-09-01T12:00:00Z"
    assert find_pod_failure(pod, wall_clock_s=NOW) is None


def test_pull_error_and_back_off_have_the_same_message() -> None:
    pulls = find_pod_failure(waiting("ErrImagePull", "no such host"), wall_clock_s=NOW)
    waits = 'Back-off pulling image "registry/i:1": ErrImagePull: no such host'
    assert find_pod_failure(waiting("ImagePullBackOff", waits), wall_clock_s=NOW) == pulls


def test_failure_names_the_missing_secret() -> None:
    failure = find_pod_failure(
        waiting("CreateContainerConfigError", 'secret "hub" not found'), wall_clock_s=NOW
    )
    assert failure is not None
    assert failure.missing_secret == "hub"


def test_reports_the_first_failing_pod_by_name() -> None:
    pods = [waiting("ErrImagePull"), make_pod("a"), unscheduled(NO_MEMORY)]
    pods[2]["metadata"]["name"] = "b"
    failure = first_pod_failure(pods, wall_clock_s=NOW)
    assert failure is not None
    assert failure.reason == "Unschedulable"
    assert first_pod_failure([], wall_clock_s=NOW) is None


@pytest.mark.parametrize(
    ("waited_s", "has_failure"), [(0.0, False), (PROVISIONING_GRACE_S - 1, False), (30.0, True)]
)
def test_a_pod_may_wait_for_its_claim_for_a_while(waited_s: float, has_failure: bool) -> None:
    pod = unscheduled(UNBOUND, lastTransitionTime=SINCE)
    failure = find_pod_failure(pod, wall_clock_s=NOW + waited_s)
    assert (failure is not None) is has_failure
    assert failure is None or failure.reason == "Unschedulable"


def test_a_pod_that_fits_no_node_has_failed_at_once() -> None:
    pod = unscheduled(NO_MEMORY, lastTransitionTime=SINCE)
    failure = find_pod_failure(pod, wall_clock_s=NOW)
    assert failure is not None
    assert failure.reason == "Unschedulable"


def test_the_next_pod_failure_is_the_end_of_the_first_wait_for_a_claim() -> None:
    pods = [
        make_pod(),
        unscheduled(NO_MEMORY, lastTransitionTime=SINCE),
        unscheduled(UNBOUND, lastTransitionTime="2026-08-29T10:40:05Z"),
        unscheduled(UNBOUND, lastTransitionTime=SINCE),
    ]
    ends = NOW + PROVISIONING_GRACE_S
    assert next_pod_failure_at(pods, wall_clock_s=NOW) == ends
    assert next_pod_failure_at(pods, wall_clock_s=ends) == ends + 5
    assert next_pod_failure_at(pods, wall_clock_s=ends + 5) is None
