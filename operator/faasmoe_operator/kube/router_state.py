"""How the routers are doing, from their Deployment and pods. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from faasmoe_operator.kube.kinds import Object
from faasmoe_operator.kube.pod_trouble import trouble_of
from faasmoe_operator.kube.verdict import Verdict, bad, good, pending


@dataclass(frozen=True, slots=True)
class RouterState:
    """What is known of the routers.

    Attributes:
        verdict: state of the condition RouterReady.
        replicas: pods that there are.
        ready: those that answer.
        secret: a Secret that one waits for.
    """

    verdict: Verdict
    replicas: int = 0
    ready: int = 0
    secret: str | None = None


def router_state(deployment: Object | None, pods: Sequence[Object], *, wanted: int) -> RouterState:
    """Return how the routers are doing.

    Args:
        deployment: the Deployment, if there is one.
        pods: its pods.
        wanted: how many replicas are asked for.
    """
    if deployment is None:
        return RouterState(pending("Deploying", "the router's Deployment is about to be made"))
    status = deployment.get("status", {})
    replicas, ready = status.get("replicas", 0), status.get("readyReplicas", 0)
    trouble = trouble_of(pods)
    verdict = _verdict(deployment, status, wanted=wanted)
    if verdict.status != "True" and trouble is not None:
        verdict = bad(trouble.reason, trouble.message)
    return RouterState(verdict, replicas, ready, secret=None if trouble is None else trouble.secret)


def _verdict(deployment: Object, status: Object, *, wanted: int) -> Verdict:
    seen = status.get("observedGeneration", 0) >= deployment["metadata"].get("generation", 0)
    updated, available = status.get("updatedReplicas", 0), status.get("availableReplicas", 0)
    if seen and updated == status.get("replicas", 0) == available == wanted:
        return good("Available", f"{available} of {wanted} routers answer")
    if seen and (stuck := _stuck(status)) is not None:
        return stuck
    if available >= wanted:
        left = f"{updated} of {wanted} routers are of the present spec, {available} answer"
        return pending("RollingOut", left)
    return pending("Starting", f"{available} of {wanted} routers answer")


def _stuck(status: Object) -> Verdict | None:
    for condition in status.get("conditions", ()):
        if condition.get("type") == "Progressing" and condition.get("status") == "False":
            said = condition.get("message") or "the routers do not come up"
            return bad("DeadlineExceeded", f"{said}; see the router's pods and their logs")
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            said = condition.get("message") or "no pod can be made"
            return bad("PodsRefused", f"the routers' pods cannot be made: {said}")
    return None
