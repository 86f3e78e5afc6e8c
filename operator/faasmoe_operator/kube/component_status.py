"""Status of a model's components: pods, routers, expert functions, tenants.

Each function maps observed objects or counters to the state of a condition. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from faasmoe_operator.api.v1alpha1.tenants import TenantSpec
from faasmoe_operator.kube.conditions import (
    ConditionState,
    condition_false,
    condition_true,
    condition_unknown,
)
from faasmoe_operator.kube.types import Object

IMAGE_PULL_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
CONTAINER_CONFIG_REASONS = ("CreateContainerConfigError",)
CONTAINER_START_REASONS = ("CreateContainerError", "RunContainerError", "StartError")
_PULL_BACKOFF = re.compile(r"Back-off pulling image \"[^\"]*\"(: \w+: )?")
_KEY_MISSING = re.compile(r"couldn't find key (?P<key>\S+) in Secret (?P<name>\S+)")
_SECRET_MISSING = re.compile(r"secret \"(?P<name>[^\"]+)\" not found")
PROVISIONING_GRACE_S = 30.0
"""How long a pod may wait for its claim before that is a failure: volumes are made meanwhile."""
PLANNING = "Planning"
WAITING_FOR_ROUTER = "WaitingForRouter"


@dataclass(frozen=True, slots=True)
class RuntimeCounts:
    """Counters of one model's functions and sandboxes.

    Attributes:
        functions: functions that the experts are partitioned into.
        active: functions with at least one ready replica.
        replicas: ready replicas of functions.
        sandboxes: sandboxes that exist.
        ready: sandboxes that are ready.
        generic: ready sandboxes without a function.
        tenant_keys: number of API keys by tenant, as routers report it; None before a report.
        failure: why no sandbox can be started; empty if there is no failure.
    """

    functions: int = 0
    active: int = 0
    replicas: int = 0
    sandboxes: int = 0
    ready: int = 0
    generic: int = 0
    tenant_keys: Mapping[str, int] | None = field(default=None)
    failure: str = ""


@dataclass(frozen=True, slots=True)
class PodFailure:
    """Why a pod does not run.

    Attributes:
        reason: reason of the condition.
        message: the failure in words, and what to do.
        missing_secret: name of a Secret that the pod waits for; None if it waits for none.
    """

    reason: str
    message: str
    missing_secret: str | None = None


def first_pod_failure(pods: Iterable[Object], *, wall_clock_s: float) -> PodFailure | None:
    """Return the failure of the first pod, by name, that has one."""
    for pod in sorted(pods, key=lambda pod: str(pod["metadata"]["name"])):
        if (failure := find_pod_failure(pod, wall_clock_s=wall_clock_s)) is not None:
            return failure
    return None


def next_pod_failure_at(pods: Iterable[Object], *, wall_clock_s: float) -> float | None:
    """Return when the next pod that waits for its claim counts as failed, in Unix time."""
    ends = (_provisioning_ends_at(pod.get("status", {})) for pod in pods)
    return min((end for end in ends if end is not None and end > wall_clock_s), default=None)


def find_pod_failure(pod: Object, *, wall_clock_s: float) -> PodFailure | None:
    """Return why a pod does not run; None if it runs, starts or terminates.

    Args:
        pod: the pod.
        wall_clock_s: Unix time, in seconds.
    """
    if "deletionTimestamp" in pod["metadata"]:
        return None
    name, status = pod["metadata"]["name"], pod.get("status", {})
    ends_at = _provisioning_ends_at(status)
    if ends_at is not None and wall_clock_s < ends_at:
        return None
    if (failure := _scheduling_failure(name, status)) is not None:
        return failure
    containers = (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ()))
    for container in containers:
        if (failure := _container_failure(name, container)) is not None:
            return failure
    if status.get("phase") == "Failed" and status.get("reason"):
        return PodFailure(status["reason"], f"pod {name}: {status.get('message') or 'failed'}")
    return None


def _unscheduled_condition(status: Object) -> Object | None:
    for condition in status.get("conditions", ()):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return dict(condition)
    return None


def _waits_for_claim(unscheduled: Object) -> bool:
    return "persistentvolumeclaim" in (unscheduled.get("message") or "").lower()


def _provisioning_ends_at(status: Object) -> float | None:
    """Return until when a pod's claim may be provisioned, in Unix time; None if it has no wait."""
    unscheduled = _unscheduled_condition(status)
    if unscheduled is None or not _waits_for_claim(unscheduled):
        return None
    since = unscheduled.get("lastTransitionTime")
    return datetime.fromisoformat(since).timestamp() + PROVISIONING_GRACE_S if since else None


def _scheduling_failure(name: str, status: Object) -> PodFailure | None:
    if (unscheduled := _unscheduled_condition(status)) is None:
        return None
    message = unscheduled.get("message") or unscheduled.get("reason") or "no node fits"
    hint = "add nodes or free some, or ask for less: resources, nodeSelector, affinity"
    if _waits_for_claim(unscheduled):
        hint = "see the claim: `kubectl describe pvc` says why it is not bound"
    return PodFailure("Unschedulable", f"pod {name}: {message.rstrip('.')}; {hint}")


def _container_failure(pod: str, container: Object) -> PodFailure | None:
    state = container.get("state", {})
    waiting = state.get("waiting") or {}
    reason, message = waiting.get("reason", ""), waiting.get("message", "")
    if reason in CONTAINER_CONFIG_REASONS:
        return _config_failure(pod, message)
    if reason in IMAGE_PULL_REASONS:
        # The kubelet alternates between messages with and without this prefix. Without it there
        # is one event and one status update.
        message = _PULL_BACKOFF.sub("", message) or "see the pod's events"
        problem = f"pod {pod}: image {container.get('image')} cannot be pulled: {message}"
        hint = "check the image's name and the template's imagePullSecrets"
        return PodFailure("ImagePullBackOff", f"{problem}; {hint}")
    if reason in CONTAINER_START_REASONS:
        return PodFailure("ContainerCannotRun", f"pod {pod}: {reason}: {message}")
    terminated = (
        state.get("terminated") or (container.get("lastState") or {}).get("terminated") or {}
    )
    if terminated.get("reason") == "OOMKilled":
        hint = "ask for more memory: template.resources, or store.resources for the store's Job"
        return PodFailure("OOMKilled", f"pod {pod}: exceeded its memory limit; {hint}")
    if reason == "CrashLoopBackOff":
        return PodFailure(
            "CrashLoopBackOff",
            f"pod {pod}: {_describe_termination(terminated)}; see `kubectl logs {pod}`",
        )
    return None


def _config_failure(pod: str, kubelet_message: str) -> PodFailure:
    if found := _KEY_MISSING.search(kubelet_message):
        secret, key = found["name"].rpartition("/")[2], found["key"]
        message = f"pod {pod}: Secret {secret} has no key {key}; add it"
        return PodFailure("SecretKeyNotFound", message, missing_secret=secret)
    if found := _SECRET_MISSING.search(kubelet_message):
        message = f"pod {pod}: there is no Secret {found['name']} in its namespace; create it"
        return PodFailure("SecretNotFound", message, missing_secret=found["name"])
    return PodFailure("CreateContainerConfigError", f"pod {pod}: {kubelet_message}")


def _describe_termination(terminated: Object) -> str:
    code = terminated.get("exitCode")
    lines = (terminated.get("message") or "").strip().splitlines()
    return f"it ended with status {code}" + (f": {lines[-1][:300]}" if lines else "")


@dataclass(frozen=True, slots=True)
class RouterComponentStatus:
    """Status of the routers.

    Attributes:
        condition: state of RouterReady.
        replicas: number of pods.
        ready_replicas: number of ready pods.
        missing_secret: name of a Secret that a pod waits for; None if none waits.
    """

    condition: ConditionState
    replicas: int = 0
    ready_replicas: int = 0
    missing_secret: str | None = None


def router_status(
    deployment: Object | None,
    pods: Sequence[Object],
    *,
    desired_replicas: int,
    wall_clock_s: float,
) -> RouterComponentStatus:
    """Return the status of the routers.

    Args:
        deployment: the router Deployment; None if it does not exist.
        pods: the router pods.
        desired_replicas: replicas in the spec.
        wall_clock_s: Unix time, in seconds.
    """
    if deployment is None:
        return RouterComponentStatus(
            condition_unknown("Deploying", "creating the router Deployment")
        )
    status = deployment.get("status", {})
    replicas, ready = status.get("replicas", 0), status.get("readyReplicas", 0)
    pod_failure = first_pod_failure(pods, wall_clock_s=wall_clock_s)
    condition = _rollout_condition(deployment, status, desired_replicas=desired_replicas)
    if condition.status != "True" and pod_failure is not None:
        condition = condition_false(pod_failure.reason, pod_failure.message)
    return RouterComponentStatus(
        condition,
        replicas,
        ready,
        missing_secret=None if pod_failure is None else pod_failure.missing_secret,
    )


def _rollout_condition(
    deployment: Object, status: Object, *, desired_replicas: int
) -> ConditionState:
    is_observed = status.get("observedGeneration", 0) >= deployment["metadata"].get("generation", 0)
    updated, available = status.get("updatedReplicas", 0), status.get("availableReplicas", 0)
    if is_observed and not desired_replicas and not status.get("replicas", 0):
        return condition_true("ScaledToZero", "no router runs; the next request starts one")
    if is_observed and updated == status.get("replicas", 0) == available == desired_replicas:
        return condition_true("Available", f"{available} of {desired_replicas} routers answer")
    if is_observed and (stalled := _stalled_condition(status)) is not None:
        return stalled
    if available >= desired_replicas:
        progress = f"{updated} of {desired_replicas} routers are updated, {available} answer"
        return condition_unknown("RollingOut", progress)
    return condition_unknown("Starting", f"{available} of {desired_replicas} routers answer")


def _stalled_condition(status: Object) -> ConditionState | None:
    for condition in status.get("conditions", ()):
        if condition.get("type") == "Progressing" and condition.get("status") == "False":
            message = condition.get("message") or "router rollout makes no progress"
            return condition_false(
                "ProgressDeadlineExceeded", f"{message}; see the router's pods and their logs"
            )
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            message = condition.get("message") or "pod creation fails"
            return condition_false("FailedCreate", f"router pods cannot be created: {message}")
    return None


def functions_condition(
    counts: RuntimeCounts | None,
    sandboxes: Sequence[Object],
    *,
    runtime_failure: ConditionState | None,
    wall_clock_s: float,
) -> ConditionState:
    """Return the state of FunctionsReady: functions serve, or can be activated.

    Args:
        counts: counters of the model's runtime; None before it has started.
        sandboxes: the sandbox pods.
        runtime_failure: why the runtime cannot be started; None if it can.
        wall_clock_s: Unix time, in seconds.
    """
    if runtime_failure is not None:
        return runtime_failure
    if counts is None:
        return condition_unknown(PLANNING, "planning the expert functions")
    if (pod_failure := first_pod_failure(sandboxes, wall_clock_s=wall_clock_s)) is not None:
        return condition_false(pod_failure.reason, pod_failure.message)
    if counts.failure:
        return condition_false("SandboxesUnavailable", counts.failure)
    summary = f"the experts are partitioned into {counts.functions} functions"
    return condition_true(
        "Planned", f"{summary}; a function at zero is activated by its first request"
    )


def active_condition(counts: RuntimeCounts | None) -> ConditionState:
    """Return the state of Active: whether any function has a replica."""
    if counts is None:
        return condition_unknown(PLANNING, "planning the expert functions")
    if counts.active == 0:
        return ConditionState("False", "NoTraffic", "scaled to zero: no traffic")
    return condition_true("Serving", f"{counts.active} functions have {counts.replicas} replicas")


def tenants_condition(
    tenants: Sequence[TenantSpec], counts: RuntimeCounts | None, *, n_gateway_tenants: int = 0
) -> ConditionState:
    """Return the state of TenantsReady: whether each tenant has an API key.

    Args:
        tenants: the tenants of the spec.
        counts: counters of the model's runtime, with the keys that routers report.
        n_gateway_tenants: Tenants that use the model by the gateways, which check their keys.
    """
    if not tenants and n_gateway_tenants:
        return condition_true(
            "GatewayTenants",
            f"{n_gateway_tenants} Tenants use it by the gateways; routers answer nobody else",
        )
    if not tenants:
        return condition_true("NoTenants", "spec.tenants is empty: requests are not authenticated")
    if counts is None or counts.tenant_keys is None:
        return condition_unknown(WAITING_FOR_ROUTER, "no router has reported the tenants' keys yet")
    tenants_missing_keys = [tenant for tenant in tenants if not counts.tenant_keys.get(tenant.name)]
    if not tenants_missing_keys:
        return condition_true("KeysFound", f"{len(tenants)} tenants have keys")
    return condition_false(
        "KeysMissing", "; ".join(_missing_keys_message(tenant) for tenant in tenants_missing_keys)
    )


def _missing_keys_message(tenant: TenantSpec) -> str:
    reference = tenant.api_keys_secret_ref
    secret = "(none given)" if reference is None else reference.name
    problem = f"tenant {tenant.name} has no key: Secret {secret} is missing or empty"
    return f"{problem}; create it with one entry for each key"
