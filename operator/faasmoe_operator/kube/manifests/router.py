"""The router: its Deployment, and what keeps it up while nodes are drained."""

from __future__ import annotations

from faasmoe_operator.kube.kinds import DEPLOYMENT, DISRUPTION_BUDGET, Object
from faasmoe_operator.kube.manifests.context import ModelContext
from faasmoe_operator.kube.manifests.environment import (
    OFFLINE,
    core_count,
    merged,
    router_additions,
    settings,
    variables,
)
from faasmoe_operator.kube.manifests.images import container_image
from faasmoe_operator.kube.manifests.names import Component, router_name, selector
from faasmoe_operator.kube.manifests.objects import new_object
from faasmoe_operator.kube.manifests.pods import http_probe, pod_template
from faasmoe_operator.kube.manifests.resources import router_resources
from faasmoe_operator.kube.manifests.secrets import token_variable
from faasmoe_operator.kube.manifests.security import container_security
from faasmoe_operator.kube.manifests.tenants import FOLDER, tenants_mounts, tenants_volumes
from faasmoe_operator.kube.manifests.volumes import (
    STATE_FOLDER,
    state_mount,
    state_volume,
    store_mount,
    store_path,
    store_volume,
    temporary_mount,
    temporary_volume,
)
from faasmoe_operator.spec.tenants_document import FILE_NAME

CONTAINER = "router"
PORT = 8000
GRACE_S = 60
"""5 s until nobody sends it requests any more, then up to 30 s for those that run."""
LEAVING_S = 5
START_S = 1800
"""A model of hundreds of GB takes long to be read."""


def router_deployment(ctx: ModelContext) -> Object:
    """Return the router's Deployment; a changed one comes up before the old one goes."""
    return new_object(
        ctx,
        DEPLOYMENT,
        router_name(ctx.name),
        component=Component.ROUTER,
        spec={
            "replicas": 0 if ctx.spec.suspend else ctx.spec.router.replicas,
            "selector": {"matchLabels": selector(ctx.name, Component.ROUTER)},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
            },
            "progressDeadlineSeconds": START_S + 300,
            "revisionHistoryLimit": 3,
            "template": _template(ctx),
        },
    )


def router_disruption_budget(ctx: ModelContext) -> Object:
    """Return the budget by which nodes are drained: one router at a time, a broken one at once."""
    return new_object(
        ctx,
        DISRUPTION_BUDGET,
        router_name(ctx.name),
        component=Component.ROUTER,
        spec={
            "maxUnavailable": 1,
            "selector": {"matchLabels": selector(ctx.name, Component.ROUTER)},
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    )


def _template(ctx: ModelContext) -> Object:
    tenants = [*tenants_volumes(ctx), state_volume()] if ctx.spec.tenants else []
    return pod_template(
        ctx,
        ctx.spec.router.template,
        Component.ROUTER,
        account=router_name(ctx.name),
        container=_container(ctx),
        volumes=[store_volume(ctx), temporary_volume(), *tenants],
        grace_s=GRACE_S,
    )


def _container(ctx: ModelContext) -> Object:
    tenants = [*tenants_mounts(ctx), state_mount()] if ctx.spec.tenants else []
    return {
        "name": CONTAINER,
        **container_image(ctx, ctx.spec.router.template, ctx.images.router),
        "command": ["python", "-m", "faasmoe_router"],
        "env": _environment(ctx),
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "resources": router_resources(ctx),
        "securityContext": container_security(),
        # It listens only when the model is loaded; from then on it lives while it answers.
        "startupProbe": http_probe("/ping", period_s=2, failures=START_S // 2),
        "livenessProbe": http_probe("/ping", period_s=10, failures=6, timeout_s=5),
        "readinessProbe": http_probe("/health", period_s=2, failures=2),
        "lifecycle": {"preStop": {"sleep": {"seconds": LEAVING_S}}},
        "volumeMounts": [store_mount(read_only=True), temporary_mount(), *tenants],
    }


def _environment(ctx: ModelContext) -> list[Object]:
    defaults = {**OFFLINE, "OMP_WAIT_POLICY": "PASSIVE"}
    return merged(
        variables(defaults),
        [core_count("OMP_NUM_THREADS", CONTAINER)],
        router_additions(ctx),
        _settings(ctx),
        [token_variable(ctx)],
    )


def _settings(ctx: ModelContext) -> list[Object]:
    router = ctx.spec.router
    return settings(
        {
            "STORE": store_path(ctx),
            "CONTROL_URL": ctx.control_url,
            "MODEL_NAME": ctx.name,
            "HOST": "0.0.0.0",
            "PORT": PORT,
            "DEVICE": router.device,
            "MAX_MODEL_LEN": router.max_model_len,
            "MAX_NUM_SEQS": router.max_num_seqs,
            "MAX_NUM_BATCHED_TOKENS": router.max_num_batched_tokens,
            "MAX_WAITING": router.max_waiting,
            "KV_CACHE_BYTES": router.kv_cache_bytes,
            "TENANTS_FILE": f"{FOLDER}/{FILE_NAME}" if ctx.spec.tenants else None,
            "STATE_DIR": STATE_FOLDER if ctx.spec.tenants else None,
        }
    )
