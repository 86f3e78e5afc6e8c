"""All objects of a MoEModel other than its sandboxes, in the order of creation."""

from __future__ import annotations

from faasmoe_operator.kube.manifests.context import GATEWAY_API, MONITORING_API, ModelContext
from faasmoe_operator.kube.manifests.names import (
    Component,
    router_name,
    sandbox_name,
    store_name,
    store_server_name,
)
from faasmoe_operator.kube.manifests.networking import (
    ingress_objects,
    pod_monitors,
    service_monitors,
    services,
    serving_policies,
    store_policies,
)
from faasmoe_operator.kube.manifests.pods import control_secret, has_caches, service_account
from faasmoe_operator.kube.manifests.router import (
    router_deployment,
    router_disruption_budget,
    tenants_config_map,
)
from faasmoe_operator.kube.manifests.store import store_claim, store_job
from faasmoe_operator.kube.manifests.store_server import store_server_objects
from faasmoe_operator.kube.types import Object


def store_objects(ctx: ModelContext) -> list[Object]:
    """Return the objects needed from the start: the store and the NetworkPolicies."""
    claim = store_claim(ctx)
    return [
        *store_policies(ctx),
        service_account(ctx, store_name(ctx.name), Component.STORE),
        *([] if claim is None else [claim]),
        store_job(ctx),
    ]


def serving_objects(ctx: ModelContext) -> list[Object]:
    """Return the objects needed once the store is prepared."""
    return [
        *serving_policies(ctx),
        service_account(ctx, router_name(ctx.name), Component.ROUTER),
        service_account(ctx, sandbox_name(ctx.name), Component.SANDBOX),
        *_store_server_account(ctx),
        control_secret(ctx),
        *store_server_objects(ctx),
        *([tenants_config_map(ctx)] if ctx.has_tenants else []),
        router_disruption_budget(ctx),
        router_deployment(ctx),
        *services(ctx),
        *ingress_objects(ctx),
        *service_monitors(ctx),
        *pod_monitors(ctx),
    ]


def _store_server_account(ctx: ModelContext) -> list[Object]:
    if not has_caches(ctx):
        return []
    return [service_account(ctx, store_server_name(ctx.name), Component.STORE_SERVER)]


def missing_apis(ctx: ModelContext) -> dict[str, str]:
    """Return the spec fields that need an API the cluster does not serve, with that API."""
    requested = {
        "spec.networking.httpRoute": (ctx.spec.networking.http_route, GATEWAY_API),
        "spec.monitoring.serviceMonitor": (ctx.spec.monitoring.service_monitor, MONITORING_API),
        "spec.monitoring.podMonitor": (ctx.spec.monitoring.pod_monitor, MONITORING_API),
    }
    return {
        field: api
        for field, (part, api) in requested.items()
        if part is not None and api not in ctx.served_apis
    }
