"""MoEModels for tests, and helpers to read their state."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from apiserver import ApiServer, Object, eventually

OWNED_PLURALS = (
    "pods",
    "services",
    "deployments",
    "jobs",
    "secrets",
    "configmaps",
    "serviceaccounts",
    "networkpolicies",
    "poddisruptionbudgets",
    "persistentvolumeclaims",
)


def make_moemodel(name: str, namespace: str, **spec: Any) -> Object:
    """Return a MoEModel."""
    return {
        "apiVersion": "faasmoe.dev/v1alpha1",
        "kind": "MoEModel",
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }


def make_secret(name: str, namespace: str, values: Mapping[str, str]) -> Object:
    """Return a Secret with these values."""
    data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
    meta = {"name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": meta, "data": data}


def make_tenant(name: str, namespace: str, **spec: Any) -> Object:
    """Return a Tenant whose keys are in the Secret NAME-keys."""
    return {
        "apiVersion": "faasmoe.dev/v1alpha1",
        "kind": "Tenant",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"apiKeysSecretRef": {"name": f"{name}-keys"}, **spec},
    }


def conditions(
    api: ApiServer, namespace: str, name: str, *, plural: str = "moemodels"
) -> dict[str, Object]:
    """Return the conditions of a MoEModel, or a Tenant, by type."""
    found = api.get(plural, namespace, name)
    return {c["type"]: c for c in found.get("status", {}).get("conditions", [])}


def wait_for_condition(
    api: ApiServer,
    namespace: str,
    name: str,
    kind: str,
    *,
    status: str = "True",
    reason: str = "",
    timeout_s: float = 240.0,
    plural: str = "moemodels",
) -> Object:
    """Wait for a condition with this status, and reason if given; return it."""
    seen = eventually(
        lambda: conditions(api, namespace, name, plural=plural),
        lambda found: (
            found.get(kind, {}).get("status") == status
            and (not reason or found[kind]["reason"] == reason)
        ),
        timeout_s=timeout_s,
    )
    return seen[kind]


def model_objects(api: ApiServer, namespace: str, model: str) -> dict[str, list[str]]:
    """Return the names of the objects that belong to a model, by plural."""
    labels = f"faasmoe.dev/model={model}"
    found = {
        plural: [o["metadata"]["name"] for o in api.list(plural, namespace, labels=labels)]
        for plural in OWNED_PLURALS
    }
    return {plural: sorted(names) for plural, names in found.items() if names}


def sandbox_pods(api: ApiServer, namespace: str, model: str) -> list[Object]:
    """Return a model's sandbox pods that are not terminating."""
    labels = f"faasmoe.dev/model={model},app.kubernetes.io/component=sandbox"
    pods = api.list("pods", namespace, labels=labels)
    return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"]]


def function_by_pod(api: ApiServer, namespace: str, model: str) -> dict[str, str]:
    """Return the function of each sandbox by the pod's uid; empty without the label."""
    pods = [pod["metadata"] for pod in sandbox_pods(api, namespace, model)]
    return {pod["uid"]: pod["labels"].get("faasmoe.dev/function", "") for pod in pods}


def router_pods(api: ApiServer, namespace: str, model: str) -> list[Object]:
    """Return a model's router pods that are ready and not terminating."""
    labels = f"faasmoe.dev/model={model},app.kubernetes.io/component=router"
    pods = api.list("pods", namespace, labels=labels)
    return [pod for pod in pods if "deletionTimestamp" not in pod["metadata"] and _is_ready(pod)]


def _is_ready(pod: Mapping[str, Any]) -> bool:
    found = pod.get("status", {}).get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in found)
