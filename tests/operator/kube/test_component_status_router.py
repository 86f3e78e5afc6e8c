from typing import Any

import pytest
from kube_objects import make_object

from faasmoe_operator.kube.component_status import router_status
from faasmoe_operator.kube.types import DEPLOYMENT, POD, Object

NOW = 1_788_000_000.0


def make_deployment(**status: Any) -> Object:
    deployment = make_object(DEPLOYMENT, "moe-router", status=status)
    deployment["metadata"]["generation"] = 3
    return deployment


def counts(total: int, updated: int, available: int, **rest: Any) -> dict[str, Any]:
    return {
        "observedGeneration": 3,
        "replicas": total,
        "updatedReplicas": updated,
        "availableReplicas": available,
        "readyReplicas": available,
        **rest,
    }


def condition(kind: str, status: str) -> list[Object]:
    return [{"type": kind, "status": status, "message": "by the controller"}]


@pytest.mark.parametrize(
    ("deployment", "expected"),
    [
        pytest.param(None, ("Unknown", "Deploying"), id="none-yet"),
        pytest.param(make_deployment(), ("Unknown", "Starting"), id="not-observed"),
        pytest.param(make_deployment(**counts(2, 2, 1)), ("Unknown", "Starting"), id="some-ready"),
        pytest.param(make_deployment(**counts(2, 2, 2)), ("True", "Available"), id="all-ready"),
        pytest.param(
            make_deployment(**counts(3, 1, 2)), ("Unknown", "RollingOut"), id="rolling-out"
        ),
        pytest.param(
            make_deployment(**{**counts(2, 2, 2), "observedGeneration": 2}),
            ("Unknown", "RollingOut"),
            id="outdated-generation",
        ),
        pytest.param(
            make_deployment(**counts(1, 1, 0, conditions=condition("Progressing", "False"))),
            ("False", "ProgressDeadlineExceeded"),
            id="stuck",
        ),
        pytest.param(
            make_deployment(**counts(0, 0, 0, conditions=condition("ReplicaFailure", "True"))),
            ("False", "FailedCreate"),
            id="rejected",
        ),
    ],
)
def test_router_condition_by_deployment_status(
    deployment: Object | None, expected: tuple[str, str]
) -> None:
    condition_state = router_status(deployment, [], desired_replicas=2, wall_clock_s=NOW).condition
    assert (condition_state.status, condition_state.reason) == expected


def test_router_status_has_replica_counts() -> None:
    status = router_status(
        make_deployment(**counts(3, 2, 1)), [], desired_replicas=2, wall_clock_s=NOW
    )
    assert (status.replicas, status.ready_replicas) == (3, 1)


def test_a_pod_failure_overrides_an_incomplete_rollout() -> None:
    waiting = {"reason": "CreateContainerConfigError", "message": 'secret "s" not found'}
    pod = make_object(POD, "p", status={"containerStatuses": [{"state": {"waiting": waiting}}]})
    status = router_status(
        make_deployment(**counts(2, 2, 1)), [pod], desired_replicas=2, wall_clock_s=NOW
    )
    assert (status.condition.status, status.condition.reason) == ("False", "SecretNotFound")
    assert status.missing_secret == "s"


def test_a_failing_surplus_pod_does_not_affect_availability() -> None:
    pod = make_object(
        POD,
        "p",
        status={"containerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull"}}}]},
    )
    assert (
        router_status(
            make_deployment(**counts(2, 2, 2)), [pod], desired_replicas=2, wall_clock_s=NOW
        ).condition.status
        == "True"
    )
