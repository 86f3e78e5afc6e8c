"""The way in from outside the cluster: an Ingress, or HTTPRoutes.

Only the API is let through: metrics and probes stay within. Each tenant has an HTTPRoute of its
own, so that a gateway's policies can be its own too; one Ingress holds all paths, as many
controllers make a load balancer for each.
"""

from __future__ import annotations

from faasmoe_operator.kube.kinds import HTTP_ROUTE, INGRESS, Object
from faasmoe_operator.kube.manifests.context import GATEWAY_API, ModelContext
from faasmoe_operator.kube.manifests.names import (
    TENANT_LABEL,
    Component,
    service_name,
    tenant_name,
)
from faasmoe_operator.kube.manifests.objects import new_object
from faasmoe_operator.kube.manifests.services import API_PATH, PORT, PORT_NAME, tenant_path
from faasmoe_operator.spec.networking import HttpRoute, Ingress, ParentReference

GATEWAY_GROUP = GATEWAY_API.partition("/")[0]


def routes(ctx: ModelContext) -> list[Object]:
    """Return the Ingress or the HTTPRoutes that are asked for and that the cluster can have."""
    networking = ctx.spec.networking
    if networking.ingress is not None:
        return [_ingress(ctx, networking.ingress)]
    if networking.http_route is None or GATEWAY_API not in ctx.api:
        return []
    route = networking.http_route
    return [
        _http_route(ctx, route, service=service_name(ctx.name), path=API_PATH),
        *(
            _http_route(
                ctx,
                route,
                service=tenant_name(ctx.name, tenant.name),
                path=tenant_path(tenant.name),
                tenant=tenant.name,
            )
            for tenant in ctx.spec.tenants
        ),
    ]


def _ingress(ctx: ModelContext, ingress: Ingress) -> Object:
    tenants = {
        tenant_path(tenant.name): tenant_name(ctx.name, tenant.name) for tenant in ctx.spec.tenants
    }
    paths = {API_PATH: service_name(ctx.name), **tenants}
    spec: Object = {"rules": [{"host": ingress.host, "http": {"paths": _ingress_paths(paths)}}]}
    if ingress.class_name is not None:
        spec["ingressClassName"] = ingress.class_name
    if ingress.tls_secret_name is not None:
        spec["tls"] = [{"hosts": [ingress.host], "secretName": ingress.tls_secret_name}]
    return new_object(
        ctx,
        INGRESS,
        service_name(ctx.name),
        component=Component.ROUTER,
        annotations=ingress.annotations,
        spec=spec,
    )


def _ingress_paths(paths: dict[str, str]) -> list[Object]:
    return [
        {
            "path": path,
            "pathType": "Prefix",
            "backend": {"service": {"name": service, "port": {"name": PORT_NAME}}},
        }
        for path, service in paths.items()
    ]


def _http_route(
    ctx: ModelContext, route: HttpRoute, *, service: str, path: str, tenant: str = ""
) -> Object:
    backend = {"group": "", "kind": "Service", "name": service, "port": PORT, "weight": 1}
    rule = {
        "matches": [{"path": {"type": "PathPrefix", "value": path}}],
        "backendRefs": [backend],
    }
    hosts = {"hostnames": list(route.hostnames)} if route.hostnames else {}
    return new_object(
        ctx,
        HTTP_ROUTE,
        service,
        component=Component.ROUTER,
        more_labels={TENANT_LABEL: tenant} if tenant else {},
        spec={"parentRefs": [_parent(p) for p in route.parent_refs], **hosts, "rules": [rule]},
    )


def _parent(parent: ParentReference) -> Object:
    return {"group": GATEWAY_GROUP, "kind": "Gateway", **parent.to_object()}
