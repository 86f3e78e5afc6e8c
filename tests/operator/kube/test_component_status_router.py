from typing import Any

import pytest
from kube_objects import make_object

from faasmoe_operator.kube.component_status import router_status
from faasmoe_operator.kube.types import DEPLOYMENT, POD, Object


def a_deployment(**status: Any) -> Object:
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
    return [{"type": kind, "status": status, "message": "said so"}]


@pytest.mark.parametrize(
    ("deployment", "expected"),
    [
        pytest.param(None, ("Unknown", "Deploying"), id="none-yet"),
        pytest.param(a_deployment(), ("Unknown", "Starting"), id="unseen"),
        pytest.param(a_deployment(**counts(2, 2, 1)), ("Unknown", "Starting"), id="some-answer"),
        pytest.param(a_deployment(**counts(2, 2, 2)), ("True", "Available"), id="all-answer"),
        pytest.param(a_deployment(**counts(3, 1, 2)), ("Unknown", "RollingOut"), id="rolling-out"),
        pytest.param(
            a_deployment(**{**counts(2, 2, 2), "observedGeneration": 2}),
            ("Unknown", "RollingOut"),
            id="of-the-spec-before",
        ),
        pytest.param(
            a_deployment(**counts(1, 1, 0, conditions=condition("Progressing", "False"))),
            ("False", "ProgressDeadlineExceeded"),
            id="stuck",
        ),
        pytest.param(
            a_deployment(**counts(0, 0, 0, conditions=condition("ReplicaFailure", "True"))),
            ("False", "FailedCreate"),
            id="refused",
        ),
    ],
)
def test_says_how_the_routers_are_doing(
    deployment: Object | None, expected: tuple[str, str]
) -> None:
    verdict = router_status(deployment, [], desired_replicas=2).condition
    assert (verdict.status, verdict.reason) == expected


def test_counts_replicas() -> None:
    state = router_status(a_deployment(**counts(3, 2, 1)), [], desired_replicas=2)
    assert (state.replicas, state.ready_replicas) == (3, 1)


def test_a_pods_trouble_says_more_than_that_one_is_missing() -> None:
    waiting = {"reason": "CreateContainerConfigError", "message": 'secret "s" not found'}
    pod = make_object(POD, "p", status={"containerStatuses": [{"state": {"waiting": waiting}}]})
    state = router_status(a_deployment(**counts(2, 2, 1)), [pod], desired_replicas=2)
    assert (state.condition.status, state.condition.reason) == ("False", "SecretNotFound")
    assert state.missing_secret == "s"


def test_trouble_of_a_pod_too_many_is_none_of_the_models() -> None:
    pod = make_object(
        POD, "p", status={"containerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull"}}}]}
    )
    assert (
        router_status(a_deployment(**counts(2, 2, 2)), [pod], desired_replicas=2).condition.status
        == "True"
    )
