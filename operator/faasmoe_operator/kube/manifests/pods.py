"""A container's environment.

Which image a container runs, and how nodes get it.

Where a model's pods may run: the template's wishes, and one node for a claim of one node.

What a pod may do: the `restricted` Pod Security Standard, and nothing of the API.

The volumes of pods: the store's claim, a checkpoint's claim, room for temporary files.

The Secret with the token by which a model's parts know each other.

Its name carries a hash of the token, so that it never changes: another token is another Secret, and
the pods that name it are replaced.

What the model's three kinds of pods have in common.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from faasmoe_operator.api.v1alpha1.pod_template import PodTemplateSpec, TopologySpreadConstraint
from faasmoe_operator.kube.manifests.context import ModelContext, new_object
from faasmoe_operator.kube.manifests.names import (
    Component,
    control_name,
    model_labels,
    pod_selector,
    store_name,
)
from faasmoe_operator.kube.types import SECRET, SERVICE_ACCOUNT, Object

ENV_PREFIX = "FAASMOE_"

OFFLINE_ENV = {
    # The pod may not leave the cluster; libraries that try would only wait.
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": "/tmp/huggingface",
    "HOME": "/tmp",
}
"""For pods that read everything from the store."""


def env_vars(values: Mapping[str, Any]) -> list[Object]:
    """Return variables of these values."""
    return [{"name": name, "value": str(value)} for name, value in values.items()]


def faasmoe_env_vars(values: Mapping[str, Any]) -> list[Object]:
    """Return FAASMOE_ variables of the values that are given."""
    return env_vars({f"{ENV_PREFIX}{k}": v for k, v in values.items() if v is not None})


def cpu_limit_env_var(variable: str, container: str) -> Object:
    """Return a variable with the cores that a container may use, as libraries cannot see it."""
    reference = {"containerName": container, "resource": "limits.cpu", "divisor": "1"}
    return {"name": variable, "valueFrom": {"resourceFieldRef": reference}}


def router_env_overrides(ctx: ModelContext) -> list[Object]:
    """Return what the MoEModel adds to the environment of routers and of the store's Job."""
    router = ctx.spec.router
    return [variable.to_object() for variable in (*router.env, *router.template.env)]


def merge_env_vars(*parts: Iterable[Object]) -> list[Object]:
    """Return all variables, a later one in place of an earlier one of its name."""
    by_name = {variable["name"]: variable for part in parts for variable in part}
    return list(by_name.values())


def image_fields(ctx: ModelContext, template: PodTemplateSpec, default: str) -> Object:
    """Return a container's image and pull policy: the template's, else the operator's."""
    return {
        "image": template.image or default,
        "imagePullPolicy": template.image_pull_policy or ctx.images.pull_policy,
    }


def image_pull_secrets_field(ctx: ModelContext, template: PodTemplateSpec) -> Object:
    """Return the pod's pull secrets: the template's, else the operator's; none is no field."""
    template_secrets = [secret.name for secret in template.image_pull_secrets]
    names = template_secrets or ctx.images.pull_secrets
    return {"imagePullSecrets": [{"name": name} for name in names]} if names else {}


READ_WRITE_ONCE = "ReadWriteOnce"
HOSTNAME_LABEL = "kubernetes.io/hostname"
REQUIRED_TERMS = "requiredDuringSchedulingIgnoredDuringExecution"


def scheduling_fields(ctx: ModelContext, template: PodTemplateSpec, component: Component) -> Object:
    """Return the fields of a pod's spec that the scheduler and the node go by."""
    fields: Object = {
        "nodeSelector": dict(template.node_selector or {}),
        "tolerations": [toleration.to_object() for toleration in template.tolerations],
        "affinity": _affinity(ctx, template),
        "topologySpreadConstraints": _topology_spread(ctx, template, component),
        "priorityClassName": template.priority_class_name,
        "runtimeClassName": template.runtime_class_name,
    }
    return {name: value for name, value in fields.items() if value}


def is_single_node_claim(ctx: ModelContext) -> bool:
    """Return whether the store's claim can be mounted on one node only."""
    return ctx.spec.store.access_mode == READ_WRITE_ONCE


def _affinity(ctx: ModelContext, template: PodTemplateSpec) -> Object:
    affinity: Object = {} if template.affinity is None else template.affinity.to_object()
    if not is_single_node_claim(ctx):
        return affinity
    # Elsewhere a pod would be bound and then wait for the volume without end.
    colocation_term = {
        "labelSelector": {"matchLabels": pod_selector(ctx.name)},
        "topologyKey": HOSTNAME_LABEL,
    }
    pod_affinity = affinity.get("podAffinity", {})
    terms = pod_affinity.get(REQUIRED_TERMS, [])
    if isinstance(terms, list):  # else the API server says what is wrong with it
        affinity["podAffinity"] = {**pod_affinity, REQUIRED_TERMS: [*terms, colocation_term]}
    return affinity


def _topology_spread(
    ctx: ModelContext, template: PodTemplateSpec, component: Component
) -> list[Object]:
    constraints = template.topology_spread_constraints
    if not constraints and component is Component.ROUTER and not is_single_node_claim(ctx):
        constraints = (TopologySpreadConstraint.model_validate({"topologyKey": HOSTNAME_LABEL}),)
    selector_field = {"matchLabels": pod_selector(ctx.name, component)}
    return [
        {**constraint.to_object(), "labelSelector": selector_field} for constraint in constraints
    ]


USER_ID = 65532
"""The user of the images; it owns nothing in them."""


def pod_security_context() -> Object:
    """Return a pod's security context; the group is what makes a claim writable."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER_ID,
        "runAsGroup": USER_ID,
        "fsGroup": USER_ID,
        # Else every start would walk over all files of the store.
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security_context() -> Object:
    """Return a container's security context."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
    }


def service_account(ctx: ModelContext, name: str, component: Component) -> Object:
    """Return an account that has no rights and of which no pod gets a token."""
    return new_object(
        ctx, SERVICE_ACCOUNT, name, component=component, automountServiceAccountToken=False
    )


STORE_MOUNT_PATH = "/store"
SOURCE_MOUNT_PATH = "/source"
TMP_MOUNT_PATH = "/tmp"
TMP_SIZE_LIMIT = "2Gi"
STATE_MOUNT_PATH = "/var/lib/faasmoe"
STATE_SIZE_LIMIT = "64Mi"


def store_claim_name(ctx: ModelContext) -> str:
    """Return the claim that the store is in: the one that is named, else the model's own."""
    return ctx.spec.store.claim_name or store_name(ctx.name)


def store_path(ctx: ModelContext) -> str:
    """Return the store's folder as every pod of the model sees it."""
    return f"{STORE_MOUNT_PATH}/{ctx.model.store_sub_path}"


def checkpoint_source(ctx: ModelContext) -> str:
    """Return the checkpoint as the store's Job is told it: a path if it is in a claim."""
    claim_path = ctx.spec.model.claim_path
    if claim_path is None:
        return ctx.spec.model.source
    return f"{SOURCE_MOUNT_PATH}/{claim_path.claim}/{claim_path.path}".rstrip("/")


def store_volume(ctx: ModelContext) -> Object:
    """Return the volume of the store's claim."""
    # Read-only is each mount's to say: said here, two pods of one node could not share a claim.
    return {"name": "store", "persistentVolumeClaim": {"claimName": store_claim_name(ctx)}}


def store_mount(*, read_only: bool) -> Object:
    """Return where the claim is mounted."""
    return {"name": "store", "mountPath": STORE_MOUNT_PATH, "readOnly": read_only}


def source_volumes(ctx: ModelContext) -> list[Object]:
    """Return the volume of the checkpoint, if it is in a claim."""
    claim_path = ctx.spec.model.claim_path
    if claim_path is None:
        return []
    return [{"name": "source", "persistentVolumeClaim": {"claimName": claim_path.claim}}]


def source_mounts(ctx: ModelContext) -> list[Object]:
    """Return where the checkpoint's claim is mounted, if it is in one."""
    claim_path = ctx.spec.model.claim_path
    if claim_path is None:
        return []
    return [
        {"name": "source", "mountPath": f"{SOURCE_MOUNT_PATH}/{claim_path.claim}", "readOnly": True}
    ]


def tmp_volume() -> Object:
    """Return room for temporary files; the root file system takes none."""
    return {"name": "tmp", "emptyDir": {"sizeLimit": TMP_SIZE_LIMIT}}


def tmp_mount() -> Object:
    """Return where temporary files go."""
    return {"name": "tmp", "mountPath": TMP_MOUNT_PATH}


def state_volume() -> Object:
    """Return room for what a router keeps over restarts of its container: tenants' accounts.

    It goes with the pod; what is to last longer is scraped as metrics.
    """
    return {"name": "state", "emptyDir": {"sizeLimit": STATE_SIZE_LIMIT}}


def state_mount() -> Object:
    """Return where the router keeps its state."""
    return {"name": "state", "mountPath": STATE_MOUNT_PATH}


TOKEN_KEY = "token"


def control_secret_name(ctx: ModelContext) -> str:
    """Return the name of the control Secret."""
    return control_name(ctx.name, ctx.secrets.digest)


def control_secret(ctx: ModelContext) -> Object:
    """Return the control Secret; the function key is nobody's but the operator's."""
    return new_object(
        ctx,
        SECRET,
        control_secret_name(ctx),
        component=Component.CONTROL,
        type="Opaque",
        immutable=True,
        data={TOKEN_KEY: base64.b64encode(ctx.secrets.token.encode()).decode()},
    )


def token_env_var(ctx: ModelContext) -> Object:
    """Return FAASMOE_TOKEN, read from the control Secret."""
    reference = {"name": control_secret_name(ctx), "key": TOKEN_KEY}
    return {"name": "FAASMOE_TOKEN", "valueFrom": {"secretKeyRef": reference}}


POD_HASH_CHARS = 12


def pod_template(
    ctx: ModelContext,
    template: PodTemplateSpec,
    component: Component,
    *,
    service_account_name: str,
    container: Object,
    volumes: list[Object],
    termination_grace_s: int,
) -> Object:
    """Return metadata and spec of a pod, ours before the template's where they meet.

    Args:
        ctx: the model.
        template: what the MoEModel says of pods of this kind.
        component: which kind.
        account: name of its ServiceAccount.
        container: its one container.
        volumes: its volumes.
        grace_s: how long it may take to end.
    """
    metadata: Object = {"labels": {**(template.labels or {}), **model_labels(ctx.name, component)}}
    if template.annotations:
        metadata["annotations"] = dict(template.annotations)
    spec = {
        "serviceAccountName": service_account_name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security_context(),
        "terminationGracePeriodSeconds": termination_grace_s,
        "containers": [container],
        "volumes": volumes,
        **image_pull_secrets_field(ctx, template),
        **scheduling_fields(ctx, template, component),
    }
    return {"metadata": metadata, "spec": spec}


def pod_hash(pod: Object) -> str:
    """Return what tells a pod, or a pod template, from another one."""
    text = json.dumps(pod, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:POD_HASH_CHARS]


def http_probe(path: str, *, period_s: int, failure_threshold: int, timeout_s: int = 2) -> Object:
    """Return a probe of a container's port `http`."""
    return {
        "httpGet": {"path": path, "port": "http", "scheme": "HTTP"},
        "periodSeconds": period_s,
        "timeoutSeconds": timeout_s,
        "failureThreshold": failure_threshold,
        "successThreshold": 1,
    }
