"""Building blocks of the router, sandbox and store pods.

Environment, image, scheduling, security context, volumes and control token. Pods comply with the
`restricted` Pod Security Standard and cannot use the Kubernetes API.
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
    COMPONENT_LABEL,
    Component,
    control_name,
    model_labels,
    pod_selector,
    store_name,
    truncate_name,
)
from faasmoe_operator.kube.types import SECRET, SERVICE_ACCOUNT, Object

ENV_PREFIX = "FAASMOE_"
OFFLINE_ENV = {
    # NetworkPolicies block the internet; libraries that try to reach it would time out.
    "HF_HUB_OFFLINE": "1",
    "HF_HOME": "/tmp/huggingface",
    "HOME": "/tmp",
}
"""Environment of pods that read everything from the store."""
READ_WRITE_ONCE = "ReadWriteOnce"
HOSTNAME_LABEL = "kubernetes.io/hostname"
REQUIRED_TERMS = "requiredDuringSchedulingIgnoredDuringExecution"
STORE_MOUNT_PATH = "/store"
SOURCE_MOUNT_PATH = "/source"
SOURCE_IMAGE_PATH = f"{SOURCE_MOUNT_PATH}/image"
TMP_MOUNT_PATH = "/tmp"
TMP_SIZE_LIMIT = "2Gi"
STATE_MOUNT_PATH = "/var/lib/faasmoe"
STATE_SIZE_LIMIT = "64Mi"
TLS_MOUNT_PATH = "/etc/faasmoe/tls"
TLS_FILE_MODE = 0o440
TOKEN_KEY = "token"
FRONT_TOKEN_KEY = "front-token"
METRICS_PORT_NAME = "metrics"
POD_HASH_CHARS = 12


def env_vars(values: Mapping[str, Any]) -> list[Object]:
    """Return environment variables with these values."""
    return [{"name": name, "value": str(value)} for name, value in values.items()]


def faasmoe_env_vars(values: Mapping[str, Any]) -> list[Object]:
    """Return FAASMOE_ environment variables; values that are None are left out."""
    return env_vars({f"{ENV_PREFIX}{k}": v for k, v in values.items() if v is not None})


def cpu_limit_env_var(variable: str, container: str) -> Object:
    """Return a variable with a container's CPU limit, which libraries do not detect."""
    reference = {"containerName": container, "resource": "limits.cpu", "divisor": "1"}
    return {"name": variable, "valueFrom": {"resourceFieldRef": reference}}


def router_env_overrides(ctx: ModelContext) -> list[Object]:
    """Return the MoEModel's additions to the environment of routers and the store Job."""
    router = ctx.spec.router
    return [variable.to_object() for variable in (*router.env, *router.template.env)]


def merge_env_vars(*parts: Iterable[Object]) -> list[Object]:
    """Return all variables; of variables with the same name the last one wins."""
    by_name = {variable["name"]: variable for part in parts for variable in part}
    return list(by_name.values())


def image_fields(ctx: ModelContext, template: PodTemplateSpec, default: str) -> Object:
    """Return image and imagePullPolicy: the template's, else the operator's defaults."""
    return {
        "image": template.image or default,
        "imagePullPolicy": template.image_pull_policy or ctx.images.pull_policy,
    }


def image_pull_secrets_field(ctx: ModelContext, template: PodTemplateSpec) -> Object:
    """Return imagePullSecrets: the template's, else the operator's; no field if there are none."""
    template_secrets = [secret.name for secret in template.image_pull_secrets]
    names = template_secrets or ctx.images.pull_secrets
    return {"imagePullSecrets": [{"name": name} for name in names]} if names else {}


def scheduling_fields(ctx: ModelContext, template: PodTemplateSpec, component: Component) -> Object:
    """Return the fields of a pod's spec that affect scheduling."""
    fields: Object = {
        "nodeSelector": dict(template.node_selector or {}),
        "tolerations": [toleration.to_object() for toleration in template.tolerations],
        "affinity": _affinity(ctx, template, component),
        "topologySpreadConstraints": _topology_spread(ctx, template, component),
        "priorityClassName": template.priority_class_name,
        "runtimeClassName": template.runtime_class_name,
    }
    return {name: value for name, value in fields.items() if value}


def is_single_node_claim(ctx: ModelContext) -> bool:
    """Return whether the store is in a claim that can be mounted on only one node."""
    store = ctx.spec.store
    return store.image is None and store.access_mode == READ_WRITE_ONCE


def has_caches(ctx: ModelContext) -> bool:
    """Return whether sandboxes have caches instead of the store."""
    return ctx.spec.store.cache is not None


def _affinity(ctx: ModelContext, template: PodTemplateSpec, component: Component) -> Object:
    affinity: Object = {} if template.affinity is None else template.affinity.to_object()
    is_anywhere = has_caches(ctx) and component is Component.SANDBOX
    if is_anywhere or not is_single_node_claim(ctx):
        return affinity
    # The scheduler would bind a pod to another node, where it waits for the volume forever.
    colocation_term = {"labelSelector": _claim_users(ctx), "topologyKey": HOSTNAME_LABEL}
    pod_affinity = affinity.get("podAffinity", {})
    terms = pod_affinity.get(REQUIRED_TERMS, [])
    if isinstance(terms, list):  # otherwise the API server rejects it
        affinity["podAffinity"] = {**pod_affinity, REQUIRED_TERMS: [*terms, colocation_term]}
    return affinity


def _claim_users(ctx: ModelContext) -> Object:
    """Return the selector of the pods that mount the store's claim."""
    selector: Object = {"matchLabels": pod_selector(ctx.name)}
    if has_caches(ctx):
        values = [Component.SANDBOX.value]
        other = {"key": COMPONENT_LABEL, "operator": "NotIn", "values": values}
        selector["matchExpressions"] = [other]
    return selector


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


def template_volumes(template: PodTemplateSpec) -> list[Object]:
    """Return the template's own volumes, with names that those of the operator do not have."""
    return [
        {**volume.to_object(), "name": _template_volume_name(volume.name)}
        for volume in template.volumes
    ]


def template_mounts(template: PodTemplateSpec) -> list[Object]:
    """Return the mounts of the template's own volumes."""
    return [
        {**mount.to_object(), "name": _template_volume_name(mount.name)}
        for mount in template.volume_mounts
    ]


def _template_volume_name(name: str) -> str:
    return truncate_name(f"template-{name}")


def pod_security_context(ctx: ModelContext) -> Object:
    """Return a pod's security context; fsGroup makes the claim writable."""
    ids = ("runAsUser", "runAsGroup", "fsGroup")
    return {
        "runAsNonRoot": True,
        **({} if ctx.user_id is None else dict.fromkeys(ids, ctx.user_id)),
        # Otherwise every start would visit all files of the store.
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
    """Return a ServiceAccount without permissions; its token is not mounted."""
    return new_object(
        ctx, SERVICE_ACCOUNT, name, component=component, automountServiceAccountToken=False
    )


def store_claim_name(ctx: ModelContext) -> str:
    """Return the name of the store's claim: the one in the spec, else the model's own."""
    return ctx.spec.store.claim_name or store_name(ctx.name)


def store_path(ctx: ModelContext) -> str:
    """Return the path of the store in every pod of the model."""
    return f"{STORE_MOUNT_PATH}/{ctx.model.store_sub_path}".rstrip("/")


def checkpoint_source(ctx: ModelContext) -> str:
    """Return the checkpoint source for the store Job: a path if it is in a claim or an image."""
    model = ctx.spec.model
    if model.claim_path is not None:
        return f"{SOURCE_MOUNT_PATH}/{model.claim_path.claim}/{model.claim_path.path}".rstrip("/")
    return model.source if model.image is None else SOURCE_IMAGE_PATH


def _image_volume(ctx: ModelContext, name: str, reference: str) -> Object:
    """Return a volume with the files of an OCI artifact, which the kubelet pulls."""
    image = {"reference": reference, "pullPolicy": ctx.images.pull_policy}
    return {"name": name, "image": image}


def store_volume(ctx: ModelContext) -> Object:
    """Return the volume of the store's claim or image."""
    if (reference := ctx.spec.store.image) is not None:
        return _image_volume(ctx, "store", reference)
    # Mounts set readOnly. Set here, two pods of one node could not share the claim.
    return {"name": "store", "persistentVolumeClaim": {"claimName": store_claim_name(ctx)}}


def store_mount(*, read_only: bool) -> Object:
    """Return the mount of the store's volume."""
    return {"name": "store", "mountPath": STORE_MOUNT_PATH, "readOnly": read_only}


def source_volumes(ctx: ModelContext) -> list[Object]:
    """Return the volume of the checkpoint's claim or image, if it is in one."""
    model = ctx.spec.model
    if model.image is not None:
        return [_image_volume(ctx, "source", model.image)]
    if model.claim_path is None:
        return []
    return [{"name": "source", "persistentVolumeClaim": {"claimName": model.claim_path.claim}}]


def source_mounts(ctx: ModelContext) -> list[Object]:
    """Return the mount of the checkpoint's claim or image, if it is in one."""
    model = ctx.spec.model
    if model.image is not None:
        path = SOURCE_IMAGE_PATH
    elif model.claim_path is not None:
        path = f"{SOURCE_MOUNT_PATH}/{model.claim_path.claim}"
    else:
        return []
    return [{"name": "source", "mountPath": path, "readOnly": True}]


def tmp_volume() -> Object:
    """Return a volume for temporary files, as the root file system is read-only."""
    return {"name": "tmp", "emptyDir": {"sizeLimit": TMP_SIZE_LIMIT}}


def tmp_mount() -> Object:
    """Return the mount of the volume for temporary files."""
    return {"name": "tmp", "mountPath": TMP_MOUNT_PATH}


def state_volume() -> Object:
    """Return a volume for state that survives restarts of the router container: tenants' usage.

    It is deleted with the pod.
    """
    return {"name": "state", "emptyDir": {"sizeLimit": STATE_SIZE_LIMIT}}


def state_mount() -> Object:
    """Return the mount of the state volume."""
    return {"name": "state", "mountPath": STATE_MOUNT_PATH}


def tls_volumes(ctx: ModelContext) -> list[Object]:
    """Return the volume of the certificate; none without TLS.

    A new certificate reaches running pods: its Secret's name stays the same.
    """
    if ctx.tls_secret is None:
        return []
    source = {"secretName": ctx.tls_secret, "defaultMode": TLS_FILE_MODE}
    return [{"name": "tls", "secret": source}]


def tls_mounts(ctx: ModelContext) -> list[Object]:
    """Return the mount of the certificate; none without TLS."""
    if ctx.tls_secret is None:
        return []
    return [{"name": "tls", "mountPath": TLS_MOUNT_PATH, "readOnly": True}]


def tls_settings(ctx: ModelContext) -> dict[str, str]:
    """Return the settings of TLS; none without."""
    if ctx.tls_secret is None:
        return {}
    return {"TLS_FOLDER": TLS_MOUNT_PATH, "TLS_NAMESPACE": ctx.namespace}


def control_secret_name(ctx: ModelContext) -> str:
    """Return the name of the control Secret."""
    return control_name(ctx.name, ctx.secrets.digest)


def control_secret(ctx: ModelContext) -> Object:
    """Return the control Secret with the token. The function key stays in the operator.

    Its name contains a hash of the token and it is immutable: another token is another Secret, and
    pods that refer to it are replaced.
    """
    tokens = {TOKEN_KEY: ctx.secrets.token}
    if ctx.secrets.front_token:
        tokens[FRONT_TOKEN_KEY] = ctx.secrets.front_token
    return new_object(
        ctx,
        SECRET,
        control_secret_name(ctx),
        component=Component.CONTROL,
        type="Opaque",
        immutable=True,
        data={key: base64.b64encode(value.encode()).decode() for key, value in tokens.items()},
    )


def token_env_var(ctx: ModelContext) -> Object:
    """Return the variable FAASMOE_TOKEN with the token of the control Secret."""
    return _secret_env_var(ctx, "FAASMOE_TOKEN", TOKEN_KEY)


def front_token_env_vars(ctx: ModelContext) -> list[Object]:
    """Return the variable of what gateways show routers; none if no gateway runs."""
    if not ctx.secrets.front_token:
        return []
    return [_secret_env_var(ctx, "FAASMOE_FRONT_TOKEN", FRONT_TOKEN_KEY)]


def _secret_env_var(ctx: ModelContext, name: str, key: str) -> Object:
    reference = {"name": control_secret_name(ctx), "key": key}
    return {"name": name, "valueFrom": {"secretKeyRef": reference}}


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
    """Return metadata and spec of a pod; the operator's labels override the template's.

    Args:
        ctx: the model.
        template: the MoEModel's settings for pods of this component.
        component: the component.
        service_account_name: name of the ServiceAccount.
        container: the only container.
        volumes: the volumes.
        termination_grace_s: termination grace period, in seconds.
    """
    metadata: Object = {"labels": {**(template.labels or {}), **model_labels(ctx.name, component)}}
    if template.annotations:
        metadata["annotations"] = dict(template.annotations)
    spec = {
        "serviceAccountName": service_account_name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security_context(ctx),
        "terminationGracePeriodSeconds": termination_grace_s,
        "containers": [container],
        "volumes": [*volumes, *template_volumes(template)],
        **image_pull_secrets_field(ctx, template),
        **scheduling_fields(ctx, template, component),
    }
    return {"metadata": metadata, "spec": spec}


def pod_hash(pod: Object) -> str:
    """Return a hash of a pod or a pod template."""
    text = json.dumps(pod, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:POD_HASH_CHARS]


def container_ports(http_port: int, *, metrics_port: int) -> list[Object]:
    """Return the ports `http` and `metrics` of a container."""
    numbers = {"http": http_port, METRICS_PORT_NAME: metrics_port}
    return [{"name": n, "containerPort": port, "protocol": "TCP"} for n, port in numbers.items()]


def http_probe(
    ctx: ModelContext, path: str, *, period_s: int, failure_threshold: int, timeout_s: int = 2
) -> Object:
    """Return an HTTP probe of a container's port `http`; kubelets verify no certificate."""
    scheme = "HTTP" if ctx.tls_secret is None else "HTTPS"
    target = {"httpGet": {"path": path, "port": "http", "scheme": scheme}}
    return target | _probe_times(period_s, failure_threshold, timeout_s)


def tcp_probe(*, period_s: int, failure_threshold: int, timeout_s: int = 2) -> Object:
    """Return a probe that connects to a container's port `http`."""
    target = {"tcpSocket": {"port": "http"}}
    return target | _probe_times(period_s, failure_threshold, timeout_s)


def _probe_times(period_s: int, failure_threshold: int, timeout_s: int) -> Object:
    return {
        "periodSeconds": period_s,
        "timeoutSeconds": timeout_s,
        "failureThreshold": failure_threshold,
        "successThreshold": 1,
    }
