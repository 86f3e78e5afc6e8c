from typing import Any

import pytest
from kube_objects import make_object

from faasmoe_operator.kube.component_status import find_pod_failure, first_pod_failure
from faasmoe_operator.kube.types import POD, Object


def a_pod(name: str = "p", **status: Any) -> Object:
    return make_object(POD, name, status=status)


def waiting(reason: str, message: str = "", **rest: Any) -> Object:
    state = {"waiting": {"reason": reason, "message": message}}
    container = {"name": "c", "image": "registry/i:1", "state": state, **rest}
    return a_pod(phase="Pending", containerStatuses=[container])


def unscheduled(message: str) -> Object:
    condition = {"type": "PodScheduled", "status": "False", "message": message}
    return a_pod(phase="Pending", conditions=[condition])


NO_MEMORY = "0/3 nodes are available: 3 Insufficient memory."
UNBOUND = "pod has unbound immediate PersistentVolumeClaims."
CRASHED = {"terminated": {"exitCode": 1, "message": "Traceback\nValueError: no such file"}}
OOM_KILLED = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}


@pytest.mark.parametrize(
    ("pod", "reason", "says"),
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
            a_pod(phase="Failed", reason="Evicted", message="The node was low on disk"),
            "Evicted",
            "low on disk",
        ),
    ],
)
def test_says_why_a_pod_does_not_run(pod: Object, reason: str, says: str) -> None:
    trouble = find_pod_failure(pod)
    assert trouble is not None
    assert trouble.reason == reason
    assert says in trouble.message


@pytest.mark.parametrize(
    "pod",
    [
        pytest.param(a_pod(), id="no-status-yet"),
        pytest.param(waiting("ContainerCreating"), id="starting"),
        pytest.param(waiting("PodInitializing"), id="initializing"),
        pytest.param(a_pod(phase="Running", containerStatuses=[{"state": {}}]), id="running"),
        pytest.param(a_pod(phase="Failed"), id="failed-by-itself"),
    ],
)
def test_is_quiet_while_nothing_is_wrong(pod: Object) -> None:
    assert find_pod_failure(pod) is None


def test_does_not_speak_of_pods_that_go() -> None:
    pod = waiting("ErrImagePull")
    pod["metadata"]["deletionTimestamp"] = "2026-09-01T12:00:00Z"
    assert find_pod_failure(pod) is None


def test_says_the_same_of_a_pull_and_of_its_back_off() -> None:
    pulls = find_pod_failure(waiting("ErrImagePull", "no such host"))
    waits = 'Back-off pulling image "registry/i:1": ErrImagePull: no such host'
    assert find_pod_failure(waiting("ImagePullBackOff", waits)) == pulls


def test_names_the_missing_secret() -> None:
    trouble = find_pod_failure(waiting("CreateContainerConfigError", 'secret "hub" not found'))
    assert trouble is not None
    assert trouble.missing_secret == "hub"


def test_of_several_pods_the_first_in_trouble_counts() -> None:
    pods = [waiting("ErrImagePull"), a_pod("a"), unscheduled(NO_MEMORY)]
    pods[2]["metadata"]["name"] = "b"
    trouble = first_pod_failure(pods)
    assert trouble is not None
    assert trouble.reason == "Unschedulable"
    assert first_pod_failure([]) is None
