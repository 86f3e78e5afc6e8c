"""Services in front of the routers: the model's, and one for each tenant; and their addresses.

All select the same pods. A router knows a tenant by its key, or by its name in the path.
"""

from __future__ import annotations

from faasmoe_operator.kube.kinds import SERVICE, Object
from faasmoe_operator.kube.manifests.context import ModelContext
from faasmoe_operator.kube.manifests.names import (
    TENANT_LABEL,
    Component,
    selector,
    service_name,
    tenant_name,
)
from faasmoe_operator.kube.manifests.objects import new_object

PORT = 80
PORT_NAME = "http"
API_PATH = "/v1"


def services(ctx: ModelContext) -> list[Object]:
    """Return the Services."""
    tenants = [
        _service(ctx, tenant_name(ctx.name, tenant.name), {TENANT_LABEL: tenant.name})
        for tenant in ctx.spec.tenants
    ]
    return [_service(ctx, service_name(ctx.name), {}), *tenants]


def model_url(ctx: ModelContext) -> str:
    """Return the base URL of the model for OpenAI's clients."""
    return f"{_origin(ctx, service_name(ctx.name))}{API_PATH}"


def tenant_url(ctx: ModelContext, tenant: str) -> str:
    """Return the base URL of a tenant for OpenAI's clients."""
    return f"{_origin(ctx, tenant_name(ctx.name, tenant))}{tenant_path(tenant)}"


def tenant_path(tenant: str) -> str:
    """Return the path under which a tenant's API is."""
    return f"/{tenant}{API_PATH}"


def _service(ctx: ModelContext, name: str, more_labels: dict[str, str]) -> Object:
    port = {"name": PORT_NAME, "port": PORT, "targetPort": "http", "protocol": "TCP"}
    return new_object(
        ctx,
        SERVICE,
        name,
        component=Component.ROUTER,
        more_labels=more_labels,
        spec={
            "type": "ClusterIP",
            "selector": selector(ctx.name, Component.ROUTER),
            "ports": [port],
        },
    )


def _origin(ctx: ModelContext, service: str) -> str:
    """Return scheme and host: those that clients outside use, if there are any."""
    networking = ctx.spec.networking
    if networking.ingress is not None:
        scheme = "http" if networking.ingress.tls_secret_name is None else "https"
        return f"{scheme}://{networking.ingress.host}"
    if networking.http_route is not None and networking.http_route.hostnames:
        # The listener, which is the Gateway's, ends TLS; nearly all do.
        return f"https://{networking.http_route.hostnames[0]}"
    return f"http://{service}.{ctx.namespace}.svc"
