from typing import Any

import pytest
from kube_objects import an_object

from faasmoe_operator.kube.kinds import DEPLOYMENT, POD, Object
from faasmoe_operator.kube.router_state import router_state


def a_deployment(**status: Any) -> Object:
    deployment = an_object(DEPLOYMENT, "moe-router", status=status)
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
            ("False", "DeadlineExceeded"),
            id="stuck",
        ),
        pytest.param(
            a_deployment(**counts(0, 0, 0, conditions=condition("ReplicaFailure", "True"))),
            ("False", "PodsRefused"),
            id="refused",
        ),
    ],
)
def test_says_how_the_routers_are_doing(
    deployment: Object | None, expected: tuple[str, str]
) -> None:
    verdict = router_state(deployment, [], wanted=2).verdict
    assert (verdict.status, verdict.reason) == expected


def test_counts_replicas() -> None:
    state = router_state(a_deployment(**counts(3, 2, 1)), [], wanted=2)
    assert (state.replicas, state.ready) == (3, 1)


def test_a_pods_trouble_says_more_than_that_one_is_missing() -> None:
    waiting = {"reason": "CreateContainerConfigError", "message": 'secret "s" not found'}
    pod = an_object(POD, "p", status={"containerStatuses": [{"state": {"waiting": waiting}}]})
    state = router_state(a_deployment(**counts(2, 2, 1)), [pod], wanted=2)
    assert (state.verdict.status, state.verdict.reason) == ("False", "SecretMissing")
    assert state.secret == "s"


def test_trouble_of_a_pod_too_many_is_none_of_the_models() -> None:
    pod = an_object(
        POD, "p", status={"containerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull"}}}]}
    )
    assert router_state(a_deployment(**counts(2, 2, 2)), [pod], wanted=2).verdict.status == "True"
