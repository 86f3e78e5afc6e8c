from typing import Any

import pytest
from kube_objects import make_object

from faasmoe_operator.kube.component_status import find_pod_failure, first_pod_failure
from faasmoe_operator.kube.types import POD, Object


def make_pod(name: str = "p", **status: Any) -> Object:
    return make_object(POD, name, status=status)


def waiting(reason: str, message: str = "", **rest: Any) -> Object:
    state = {"waiting": {"reason": reason, "message": message}}
    container = {"name": "c", "image": "registry/i:1", "state": state, **rest}
    return make_pod(phase="Pending", containerStatuses=[container])


def unscheduled(message: str) -> Object:
    condition = {"type": "PodScheduled", "status": "False", "message": message}
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
    failure = find_pod_failure(pod)
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
    assert find_pod_failure(pod) is None


def test_a_terminating_pod_has_no_failure() -> None:
    pod = waiting("ErrImagePull")
    pod["metadata"]["deletionTimestamp"] = "2026-09-01T12:00:00Z"
    assert find_pod_failure(pod) is None


def test_pull_error_and_back_off_have_the_same_message() -> None:
    pulls = find_pod_failure(waiting("ErrImagePull", "no such host"))
    waits = 'Back-off pulling image "registry/i:1": ErrImagePull: no such host'
    assert find_pod_failure(waiting("ImagePullBackOff", waits)) == pulls


def test_failure_names_the_missing_secret() -> None:
    failure = find_pod_failure(waiting("CreateContainerConfigError", 'secret "hub" not found'))
    assert failure is not None
    assert failure.missing_secret == "hub"


def test_reports_the_first_failing_pod_by_name() -> None:
    pods = [waiting("ErrImagePull"), make_pod("a"), unscheduled(NO_MEMORY)]
    pods[2]["metadata"]["name"] = "b"
    failure = first_pod_failure(pods)
    assert failure is not None
    assert failure.reason == "Unschedulable"
    assert first_pod_failure([]) is None
