"""A sandbox: a bare pod from one template, generic until functions are loaded into it.

The template hash covers the whole pod except its name; pods with another hash are replaced.
"""

from __future__ import annotations

from faasmoe_operator.kube.manifests.context import ModelContext, new_object
from faasmoe_operator.kube.manifests.names import (
    POOL_LABEL,
    TEMPLATE_LABEL,
    Component,
    Pool,
    sandbox_name,
)
from faasmoe_operator.kube.manifests.pods import (
    OFFLINE_ENV,
    container_ports,
    container_security_context,
    env_vars,
    faasmoe_env_vars,
    has_caches,
    http_probe,
    image_fields,
    merge_env_vars,
    pod_hash,
    pod_template,
    store_mount,
    store_volume,
    template_mounts,
    tls_mounts,
    tls_settings,
    tls_volumes,
    tmp_mount,
    tmp_volume,
    token_env_var,
)
from faasmoe_operator.kube.manifests.resources import (
    mebibytes,
    sandbox_cache_bytes,
    sandbox_resources,
)
from faasmoe_operator.kube.manifests.store_server import store_server_url
from faasmoe_operator.kube.types import POD, Object
from faasmoe_operator.platforms.zygote import SANDBOX_ENVIRONMENT

SANDBOX_CONTAINER = "sandbox"
SANDBOX_PORT = 9090
SANDBOX_METRICS_PORT = 9091
TERMINATION_GRACE_S = 30
STARTUP_TIMEOUT_S = 300
CACHE_MOUNT_PATH = "/cache"
CACHE_MARGIN_BYTES = 256 << 20
"""Manifests, headers and file systems' own blocks, beside what a cache counts."""


def sandbox_pod(ctx: ModelContext, *, name: str) -> Object:
    """Return the pod of a generic sandbox; raises PlanError for an invalid granularity."""
    return _pod(ctx, name=name, template_hash=sandbox_template_hash(ctx))


def sandbox_template_hash(ctx: ModelContext) -> str:
    """Return the hash of the sandbox template; raises PlanError."""
    return pod_hash(_pod(ctx, name="", template_hash=""))


def _pod(ctx: ModelContext, *, name: str, template_hash: str) -> Object:
    pod = pod_template(
        ctx,
        ctx.spec.experts.template,
        Component.SANDBOX,
        service_account_name=sandbox_name(ctx.name),
        container=_container(ctx),
        volumes=[_weights_volume(ctx), tmp_volume(), *tls_volumes(ctx)],
        termination_grace_s=TERMINATION_GRACE_S,
    )
    # A restarted container would hold no functions: the pod is replaced instead.
    pod["spec"]["restartPolicy"] = "Never"
    return new_object(
        ctx,
        POD,
        name,
        component=Component.SANDBOX,
        extra_labels={
            **pod["metadata"]["labels"],
            TEMPLATE_LABEL: template_hash,
            POOL_LABEL: Pool.WARM.value,
        },
        annotations=pod["metadata"].get("annotations"),
        spec=pod["spec"],
    )


def _container(ctx: ModelContext) -> Object:
    template = ctx.spec.experts.template
    return {
        "name": SANDBOX_CONTAINER,
        **image_fields(ctx, template, ctx.images.expert),
        "command": ["python", "-m", "faasmoe_expert"],
        "env": _environment(ctx),
        "ports": container_ports(SANDBOX_PORT, metrics_port=SANDBOX_METRICS_PORT),
        "resources": sandbox_resources(ctx),
        "securityContext": container_security_context(),
        "startupProbe": http_probe(
            ctx, "/healthz", period_s=1, failure_threshold=STARTUP_TIMEOUT_S
        ),
        "livenessProbe": http_probe(ctx, "/healthz", period_s=10, failure_threshold=6, timeout_s=5),
        "readinessProbe": http_probe(ctx, "/readyz", period_s=5, failure_threshold=2),
        "volumeMounts": [
            _weights_mount(ctx),
            tmp_mount(),
            *tls_mounts(ctx),
            *template_mounts(template),
        ],
    }


def _weights_volume(ctx: ModelContext) -> Object:
    """Return the volume of the store, or of the cache in its place."""
    if not has_caches(ctx):
        return store_volume(ctx)
    size_limit = mebibytes(sandbox_cache_bytes(ctx) + CACHE_MARGIN_BYTES)
    return {"name": "cache", "emptyDir": {"sizeLimit": size_limit}}


def _weights_mount(ctx: ModelContext) -> Object:
    if not has_caches(ctx):
        return store_mount(read_only=True)
    return {"name": "cache", "mountPath": CACHE_MOUNT_PATH}


def _environment(ctx: ModelContext) -> list[Object]:
    experts = ctx.spec.experts
    config_env = faasmoe_env_vars(
        {
            "HOST": "0.0.0.0",
            "PORT": SANDBOX_PORT,
            "METRICS_PORT": SANDBOX_METRICS_PORT,
            "CAPACITY": experts.functions_per_sandbox,
            "DEVICE": experts.device,
            "THREADS": experts.threads,
            **_cache_settings(ctx),
            **tls_settings(ctx),
        }
    )
    name = {"name": "FAASMOE_SANDBOX_ID", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
    template_env = [variable.to_object() for variable in experts.template.env]
    return merge_env_vars(
        env_vars({**OFFLINE_ENV, **SANDBOX_ENVIRONMENT}),
        template_env,
        config_env,
        [name, token_env_var(ctx)],
    )


def _cache_settings(ctx: ModelContext) -> dict[str, str | int]:
    if not has_caches(ctx):
        return {}
    return {
        "STORE_PEERS": store_server_url(ctx),
        "CACHE_DIR": f"{CACHE_MOUNT_PATH}/blocks",
        "CACHE_BYTES": sandbox_cache_bytes(ctx),
    }
