"""The store server: a Deployment beside the claim that serves blocks to sandboxes with caches.

There is one only if `store.cache` is set. It has the routers' image and scheduling settings, since
it has to run where they do: on the node of the claim.
"""

from __future__ import annotations

from faasmoe_operator.api.v1alpha1.field_types import quantity_to_bytes
from faasmoe_operator.kube.manifests.context import ModelContext, new_object
from faasmoe_operator.kube.manifests.names import Component, pod_selector, store_server_name
from faasmoe_operator.kube.manifests.pods import (
    OFFLINE_ENV,
    container_security_context,
    env_vars,
    faasmoe_env_vars,
    image_fields,
    merge_env_vars,
    pod_template,
    store_mount,
    store_path,
    store_volume,
    tcp_probe,
    tls_mounts,
    tls_settings,
    tls_volumes,
    tmp_mount,
    tmp_volume,
    token_env_var,
)
from faasmoe_operator.kube.manifests.resources import with_overrides
from faasmoe_operator.kube.types import DEPLOYMENT, SERVICE, Object

STORE_SERVER_PORT = 9092
CONTAINER = "store-server"
TERMINATION_GRACE_S = 30
RESOURCES = {
    "requests": {"cpu": "100m", "memory": "256Mi"},
    "limits": {"cpu": "2", "memory": "1Gi"},
}
"""Files go from the page cache to the network without passing through the process."""


def store_server_url(ctx: ModelContext) -> str:
    """Return the URL of the store server for sandboxes."""
    scheme = "http" if ctx.tls_secret is None else "https"
    return f"{scheme}://{store_server_name(ctx.name)}.{ctx.namespace}.svc:{STORE_SERVER_PORT}"


def store_server_objects(ctx: ModelContext) -> list[Object]:
    """Return the Deployment and the Service; none without caches."""
    if ctx.spec.store.cache is None:
        return []
    return [_deployment(ctx), _service(ctx)]


def _service(ctx: ModelContext) -> Object:
    port = {"name": "http", "port": STORE_SERVER_PORT, "targetPort": "http", "protocol": "TCP"}
    return new_object(
        ctx,
        SERVICE,
        store_server_name(ctx.name),
        component=Component.STORE_SERVER,
        spec={
            "type": "ClusterIP",
            "selector": pod_selector(ctx.name, Component.STORE_SERVER),
            "ports": [port],
        },
    )


def _deployment(ctx: ModelContext) -> Object:
    pod = pod_template(
        ctx,
        ctx.spec.router.template,
        Component.STORE_SERVER,
        service_account_name=store_server_name(ctx.name),
        container=_container(ctx),
        volumes=[store_volume(ctx), tmp_volume(), *tls_volumes(ctx)],
        termination_grace_s=TERMINATION_GRACE_S,
    )
    return new_object(
        ctx,
        DEPLOYMENT,
        store_server_name(ctx.name),
        component=Component.STORE_SERVER,
        spec={
            "replicas": 0 if ctx.spec.suspend else 1,
            "selector": {"matchLabels": pod_selector(ctx.name, Component.STORE_SERVER)},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
            },
            "revisionHistoryLimit": 3,
            "template": pod,
        },
    )


def _container(ctx: ModelContext) -> Object:
    cache = ctx.spec.store.cache
    assert cache is not None
    rate = cache.max_bytes_per_second
    settings = {
        "STORE": store_path(ctx),
        "HOST": "0.0.0.0",
        "PORT": STORE_SERVER_PORT,
        "MAX_CONNECTIONS": cache.max_connections,
        "BYTES_PER_SECOND": None if rate is None else quantity_to_bytes(rate),
        **tls_settings(ctx),
    }
    return {
        "name": CONTAINER,
        **image_fields(ctx, ctx.spec.router.template, ctx.images.router),
        "command": ["python", "-m", "faasmoe_expert.blocks"],
        "env": merge_env_vars(
            env_vars(OFFLINE_ENV), faasmoe_env_vars(settings), [token_env_var(ctx)]
        ),
        "ports": [{"name": "http", "containerPort": STORE_SERVER_PORT, "protocol": "TCP"}],
        "resources": with_overrides(RESOURCES, cache.resources),
        "securityContext": container_security_context(),
        # It answers 503 while all connections are in use, which is no reason to end them.
        "startupProbe": tcp_probe(period_s=1, failure_threshold=300),
        "livenessProbe": tcp_probe(period_s=10, failure_threshold=6, timeout_s=5),
        "readinessProbe": tcp_probe(period_s=5, failure_threshold=2),
        "volumeMounts": [store_mount(read_only=True), tmp_mount(), *tls_mounts(ctx)],
    }
