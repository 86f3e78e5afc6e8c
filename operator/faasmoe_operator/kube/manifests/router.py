"""The router: Deployment, PodDisruptionBudget, and its tenants as mounted files.

Tenants are one file from a ConfigMap, and a folder of API keys for each tenant of the spec from its
Secret. Both are mounted, so that changed limits and keys reach running routers. A missing Secret
leaves an empty folder: the tenant has no keys. Tenants of the gateways have no folder: gateways
check their keys, and tell routers whose a request is.
"""

from __future__ import annotations

import json

from faasmoe_operator.api.v1alpha1.router import API_PORT
from faasmoe_operator.api.v1alpha1.tenants import TenantSpec
from faasmoe_operator.api.v1alpha1.tenants_file import TENANTS_FILE_NAME, build_tenants_file
from faasmoe_operator.kube.manifests.context import ModelContext, new_object
from faasmoe_operator.kube.manifests.names import (
    Component,
    pod_selector,
    router_name,
    tenants_config_map_name,
    truncate_name,
)
from faasmoe_operator.kube.manifests.pods import (
    OFFLINE_ENV,
    STATE_MOUNT_PATH,
    container_ports,
    container_security_context,
    cpu_limit_env_var,
    env_vars,
    faasmoe_env_vars,
    front_token_env_vars,
    http_probe,
    image_fields,
    merge_env_vars,
    pod_template,
    router_env_overrides,
    state_mount,
    state_volume,
    store_mount,
    store_path,
    store_volume,
    template_mounts,
    tls_mounts,
    tls_settings,
    tls_volumes,
    tmp_mount,
    tmp_volume,
    token_env_var,
)
from faasmoe_operator.kube.manifests.resources import router_resources
from faasmoe_operator.kube.types import CONFIG_MAP, DEPLOYMENT, POD_DISRUPTION_BUDGET, Object

TENANTS_MOUNT_PATH = "/etc/faasmoe/tenants"
KEYS_MOUNT_PATH = "/etc/faasmoe/keys"
VOLUME_FILE_MODE = 0o440
ROUTER_CONTAINER = "router"
ROUTER_PORT = API_PORT
DEFAULT_METRICS_PORT = 8001
SHUTDOWN_S = 20
"""Of a pod's grace, what is not the drain: 5 s until endpoints are updated, and a margin."""
PRE_STOP_SLEEP_S = 5
STARTUP_TIMEOUT_S = 1800
"""Reading a model of hundreds of GB takes long."""


def tenants_config_map(ctx: ModelContext) -> Object:
    """Return the ConfigMap with the tenants file."""
    # The number of routers is in the file and not in the pods, so that scaling replaces none.
    n_routers = max(1, ctx.router_replicas)
    document = build_tenants_file(
        ctx.name, (*ctx.spec.tenants, *ctx.tenants), _keys_mount_path, n_routers=n_routers
    )
    text = json.dumps(document, indent=2, ensure_ascii=False)
    return new_object(
        ctx,
        CONFIG_MAP,
        tenants_config_map_name(ctx.name),
        component=Component.ROUTER,
        data={TENANTS_FILE_NAME: text + "\n"},
    )


def tenants_volumes(ctx: ModelContext) -> list[Object]:
    """Return the router's volumes for the tenants file and the API keys."""
    source = {"name": tenants_config_map_name(ctx.name), "defaultMode": VOLUME_FILE_MODE}
    return [{"name": "tenants", "configMap": source}, *map(_keys_volume, _tenants_with_keys(ctx))]


def tenants_mounts(ctx: ModelContext) -> list[Object]:
    """Return the mounts of the tenants file and the API keys."""
    return [
        {"name": "tenants", "mountPath": TENANTS_MOUNT_PATH, "readOnly": True},
        *(
            {"name": _volume_name(tenant), "mountPath": _keys_mount_path(tenant), "readOnly": True}
            for tenant in _tenants_with_keys(ctx)
        ),
    ]


def _tenants_with_keys(ctx: ModelContext) -> list[TenantSpec]:
    return [tenant for tenant in ctx.spec.tenants if tenant.api_keys_secret_ref is not None]


def _keys_volume(tenant: TenantSpec) -> Object:
    assert tenant.api_keys_secret_ref is not None
    secret = tenant.api_keys_secret_ref.name
    source = {"secretName": secret, "optional": True, "defaultMode": VOLUME_FILE_MODE}
    return {"name": _volume_name(tenant), "secret": source}


def _keys_mount_path(tenant: TenantSpec) -> str:
    return f"{KEYS_MOUNT_PATH}/{tenant.name}"


def _volume_name(tenant: TenantSpec) -> str:
    return truncate_name(f"keys-{tenant.name}")


def router_deployment(ctx: ModelContext) -> Object:
    """Return the router Deployment; in a rollout new pods start before old ones end."""
    return new_object(
        ctx,
        DEPLOYMENT,
        router_name(ctx.name),
        component=Component.ROUTER,
        spec={
            "replicas": ctx.router_replicas,
            "selector": {"matchLabels": pod_selector(ctx.name, Component.ROUTER)},
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
            },
            "progressDeadlineSeconds": STARTUP_TIMEOUT_S + 300,
            "revisionHistoryLimit": 3,
            "template": _template(ctx),
        },
    )


def router_disruption_budget(ctx: ModelContext) -> Object:
    """Return the disruption budget: drains evict one router at a time, unhealthy ones at once."""
    return new_object(
        ctx,
        POD_DISRUPTION_BUDGET,
        router_name(ctx.name),
        component=Component.ROUTER,
        spec={
            "maxUnavailable": 1,
            "selector": {"matchLabels": pod_selector(ctx.name, Component.ROUTER)},
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    )


def _template(ctx: ModelContext) -> Object:
    tenants = [*tenants_volumes(ctx), state_volume()] if ctx.has_tenants else []
    return pod_template(
        ctx,
        ctx.spec.router.template,
        Component.ROUTER,
        service_account_name=router_name(ctx.name),
        container=_container(ctx),
        volumes=[store_volume(ctx), tmp_volume(), *tls_volumes(ctx), *tenants],
        termination_grace_s=ctx.spec.router.termination_grace_period_seconds,
    )


def _container(ctx: ModelContext) -> Object:
    tenants = [*tenants_mounts(ctx), state_mount()] if ctx.has_tenants else []
    return {
        "name": ROUTER_CONTAINER,
        **image_fields(ctx, ctx.spec.router.template, ctx.images.router),
        "command": ["python", "-m", "faasmoe_router"],
        "env": _environment(ctx),
        "ports": container_ports(ROUTER_PORT, metrics_port=router_metrics_port(ctx)),
        "resources": router_resources(ctx),
        "securityContext": container_security_context(),
        # The router listens only once the model is loaded.
        "startupProbe": http_probe(
            ctx, "/ping", period_s=2, failure_threshold=STARTUP_TIMEOUT_S // 2
        ),
        "livenessProbe": http_probe(ctx, "/ping", period_s=10, failure_threshold=6, timeout_s=5),
        "readinessProbe": http_probe(ctx, "/health", period_s=2, failure_threshold=2),
        "lifecycle": {"preStop": {"sleep": {"seconds": PRE_STOP_SLEEP_S}}},
        "volumeMounts": [
            store_mount(read_only=True),
            tmp_mount(),
            *tls_mounts(ctx),
            *tenants,
            *template_mounts(ctx.spec.router.template),
        ],
    }


def router_metrics_port(ctx: ModelContext) -> int:
    """Return the port of the routers' metrics, which is not that of the API."""
    return ctx.spec.router.metrics_port or DEFAULT_METRICS_PORT


def _environment(ctx: ModelContext) -> list[Object]:
    defaults = {**OFFLINE_ENV, "OMP_WAIT_POLICY": "PASSIVE"}
    tracing = ctx.spec.tracing
    return merge_env_vars(
        env_vars(defaults),
        env_vars({} if tracing is None else tracing.variables),
        [cpu_limit_env_var("OMP_NUM_THREADS", ROUTER_CONTAINER)],
        router_env_overrides(ctx),
        _settings(ctx),
        [token_env_var(ctx), *front_token_env_vars(ctx)],
    )


def _settings(ctx: ModelContext) -> list[Object]:
    router = ctx.spec.router
    return faasmoe_env_vars(
        {
            "STORE": store_path(ctx),
            "CONTROL_URL": ctx.control_url,
            "MODEL_NAME": router.served_model_name or ctx.name,
            "CORS_ORIGINS": ",".join(router.cors_origins) or None,
            "HOST": "0.0.0.0",
            "PORT": ROUTER_PORT,
            "ENGINE": router.engine,
            "ENGINE_ARGS": router.engine_arguments,
            "DEVICE": router.device,
            "DTYPE": router.dtype,
            "COMPUTE": router.compute,
            "MAX_MODEL_LEN": router.max_model_len,
            "MAX_NUM_SEQS": router.max_num_seqs,
            "MAX_NUM_BATCHED_TOKENS": router.max_num_batched_tokens,
            "MAX_WAITING": router.max_waiting,
            "DRAIN_TIMEOUT": router.termination_grace_period_seconds - SHUTDOWN_S,
            "METRICS_PORT": router_metrics_port(ctx),
            "KEEP_ALIVE": router.keep_alive_seconds,
            "KV_CACHE_BYTES": router.kv_cache_bytes,
            "EXPERTS_MEMORY_BYTES": ctx.spec.experts.memory_bytes,
            "GENERATION_CONFIG": router.generation_config,
            "TENANTS_FILE": f"{TENANTS_MOUNT_PATH}/{TENANTS_FILE_NAME}"
            if ctx.has_tenants
            else None,
            "STATE_DIR": STATE_MOUNT_PATH if ctx.has_tenants else None,
            **tls_settings(ctx),
        }
    )
