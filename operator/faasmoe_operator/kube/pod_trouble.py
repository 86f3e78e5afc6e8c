"""Why a pod does not run, from its status. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from faasmoe_operator.kube.kinds import Object

PULL_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull")
CONFIG_REASONS = ("CreateContainerConfigError",)
FAILED_REASONS = ("CreateContainerError", "RunContainerError", "StartError")
_BACK_OFF = re.compile(r"Back-off pulling image \"[^\"]*\"(: \w+: )?")
_KEY_MISSING = re.compile(r"couldn't find key (?P<key>\S+) in Secret (?P<name>\S+)")
_SECRET_MISSING = re.compile(r"secret \"(?P<name>[^\"]+)\" not found")


@dataclass(frozen=True, slots=True)
class Trouble:
    """What keeps a pod from running.

    Attributes:
        reason: CamelCase, machine-stable: that of the condition.
        message: for people: what is so, and what to do.
        secret: name of a Secret that the pod waits for.
    """

    reason: str
    message: str
    secret: str | None = None


def trouble_of(pods: Iterable[Object]) -> Trouble | None:
    """Return the trouble of the first pod, by name, that has any."""
    for pod in sorted(pods, key=lambda pod: str(pod["metadata"]["name"])):
        if (trouble := pod_trouble(pod)) is not None:
            return trouble
    return None


def pod_trouble(pod: Object) -> Trouble | None:
    """Return what keeps a pod from running; None if nothing does, or it is going."""
    if "deletionTimestamp" in pod["metadata"]:
        return None
    name, status = pod["metadata"]["name"], pod.get("status", {})
    if (trouble := _unschedulable(name, status)) is not None:
        return trouble
    fields = ("initContainerStatuses", "containerStatuses")
    for container in [entry for field in fields for entry in status.get(field, ())]:
        if (trouble := _container_trouble(name, container)) is not None:
            return trouble
    if status.get("phase") == "Failed" and status.get("reason"):
        return Trouble(status["reason"], f"pod {name}: {status.get('message') or 'failed'}")
    return None


def _unschedulable(name: str, status: Object) -> Trouble | None:
    for condition in status.get("conditions", ()):
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            said = condition.get("message") or condition.get("reason") or "no node takes it"
            hint = "add nodes or free some, or ask for less: resources, nodeSelector, affinity"
            if "persistentvolumeclaim" in said.lower():
                hint = "see the claim: `kubectl describe pvc` says why it is not bound"
            return Trouble("Unschedulable", f"pod {name}: {said.rstrip('.')}; {hint}")
    return None


def _container_trouble(pod: str, container: Object) -> Trouble | None:
    state = container.get("state", {})
    waiting = state.get("waiting") or {}
    reason, said = waiting.get("reason", ""), waiting.get("message", "")
    if reason in CONFIG_REASONS:
        return _config_trouble(pod, said)
    if reason in PULL_REASONS:
        # The kubelet says it in turns with and without this: one text, one event, one status.
        said = _BACK_OFF.sub("", said) or "see the pod's events"
        what = f"pod {pod}: image {container.get('image')} cannot be pulled: {said}"
        hint = "check the image's name and the template's imagePullSecrets"
        return Trouble("ImagePullFailed", f"{what}; {hint}")
    if reason in FAILED_REASONS:
        return Trouble("ContainerFailed", f"pod {pod}: {reason}: {said}")
    ended = state.get("terminated") or (container.get("lastState") or {}).get("terminated") or {}
    if ended.get("reason") == "OOMKilled":
        hint = "ask for more memory: template.resources, or store.resources for the store's Job"
        return Trouble("OutOfMemory", f"pod {pod}: it took more than its limit of memory; {hint}")
    if reason == "CrashLoopBackOff":
        return Trouble("Crashing", f"pod {pod}: {_last_words(ended)}; see `kubectl logs {pod}`")
    return None


def _config_trouble(pod: str, said: str) -> Trouble:
    if found := _KEY_MISSING.search(said):
        secret, key = found["name"].rpartition("/")[2], found["key"]
        message = f"pod {pod}: Secret {secret} has no key {key}; add it"
        return Trouble("SecretKeyMissing", message, secret=secret)
    if found := _SECRET_MISSING.search(said):
        message = f"pod {pod}: there is no Secret {found['name']} in its namespace; create it"
        return Trouble("SecretMissing", message, secret=found["name"])
    return Trouble("ContainerConfigInvalid", f"pod {pod}: {said}")


def _last_words(ended: Object) -> str:
    code = ended.get("exitCode")
    said = (ended.get("message") or "").strip().splitlines()
    return f"it ended with status {code}" + (f": {said[-1][:300]}" if said else "")
