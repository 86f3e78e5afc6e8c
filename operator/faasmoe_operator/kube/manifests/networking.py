"""Networking of a MoEModel: Services, Ingress or HTTPRoutes, NetworkPolicies, monitors.

There is a Service for the model and one for each tenant; routers identify a tenant by its API key
or the path. From outside only the API's paths are reachable, not metrics and probes. Each tenant
gets its own HTTPRoute, so that a gateway's policies can be attached to it; one Ingress has all
paths, since many controllers create a load balancer for each Ingress.

Traffic that no NetworkPolicy allows is denied in both directions:

clients ──8000──▶ routers ──9090──▶ sandboxes ◀──9090── operator
                  routers ──control port──▶ operator         store Job ──443──▶ anywhere

With `store.cache`, sandboxes ──9092──▶ store server.
Gateways may reach routers as clients do. Metrics have ports of their own on routers and sandboxes,
which `monitoring.clients` may reach.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from faasmoe_operator.api.v1alpha1.networking import (
    HTTPRouteSpec,
    IngressSpec,
    NetworkPolicyPeer,
    ParentReference,
)
from faasmoe_operator.kube.manifests.context import (
    GATEWAY_API,
    MONITORING_API,
    ModelContext,
    new_object,
)
from faasmoe_operator.kube.manifests.names import (
    COMPONENT_LABEL,
    MODEL_LABEL,
    TENANT_LABEL,
    Component,
    default_deny_name,
    pod_selector,
    router_name,
    sandbox_name,
    service_name,
    store_name,
    store_server_name,
    tenant_service_name,
)
from faasmoe_operator.kube.manifests.pods import METRICS_PORT_NAME, has_caches
from faasmoe_operator.kube.manifests.router import ROUTER_PORT, router_metrics_port
from faasmoe_operator.kube.manifests.sandbox import SANDBOX_METRICS_PORT, SANDBOX_PORT
from faasmoe_operator.kube.manifests.store_server import STORE_SERVER_PORT
from faasmoe_operator.kube.types import (
    HTTP_ROUTE,
    INGRESS,
    NETWORK_POLICY,
    POD_MONITOR,
    SERVICE,
    SERVICE_MONITOR,
    Object,
)

SERVICE_PORT = 80
SERVICE_PORT_NAME = "http"
API_PATH = "/v1"
GATEWAY_GROUP = GATEWAY_API.partition("/")[0]
NAMESPACE_LABEL = "kubernetes.io/metadata.name"
DNS_PORTS = (53, 5353)
"""Policies apply to a Service's target port, which is 5353 on OpenShift.
No peer is given, since node-local DNS caches are not pods.
"""
HTTPS_PORT = 443
METRICS_PATH = "/metrics"


def services(ctx: ModelContext) -> list[Object]:
    """Return the model's Service and one for each tenant; all select the router pods.

    The port of the metrics is one of the model's Service alone.
    """
    tenants = [
        _service(ctx, tenant_service_name(ctx.name, tenant.name), {TENANT_LABEL: tenant.name})
        for tenant in ctx.spec.tenants
    ]
    metrics_port = router_metrics_port(ctx)
    return [_service(ctx, service_name(ctx.name), {}, metrics_port=metrics_port), *tenants]


def model_url(ctx: ModelContext) -> str:
    """Return the model's base URL for OpenAI clients."""
    return f"{_public_origin(ctx, service_name(ctx.name))}{API_PATH}"


def tenant_url(ctx: ModelContext, tenant: str) -> str:
    """Return a tenant's base URL for OpenAI clients."""
    return f"{_public_origin(ctx, tenant_service_name(ctx.name, tenant))}{tenant_path(tenant)}"


def tenant_path(tenant: str) -> str:
    """Return the path prefix of a tenant's API."""
    return f"/{tenant}{API_PATH}"


def _service(
    ctx: ModelContext, name: str, extra_labels: dict[str, str], *, metrics_port: int | None = None
) -> Object:
    targets = {SERVICE_PORT_NAME: (SERVICE_PORT, "http")}
    if metrics_port is not None:
        targets[METRICS_PORT_NAME] = (metrics_port, METRICS_PORT_NAME)
    ports = [
        {"name": name, "port": number, "targetPort": target, "protocol": "TCP"}
        for name, (number, target) in targets.items()
    ]
    if ctx.tls_secret is not None:
        ports[0]["appProtocol"] = "https"  # for ingress controllers and gateways in front of it
    return new_object(
        ctx,
        SERVICE,
        name,
        component=Component.ROUTER,
        extra_labels=extra_labels,
        spec={
            "type": "ClusterIP",
            "selector": pod_selector(ctx.name, Component.ROUTER),
            "ports": ports,
        },
    )


def _public_origin(ctx: ModelContext, service: str) -> str:
    """Return scheme and host: external ones if configured, else those of a Service."""
    networking = ctx.spec.networking
    if networking.ingress is not None:
        scheme = "http" if networking.ingress.tls_secret_name is None else "https"
        return f"{scheme}://{networking.ingress.host}"
    if networking.http_route is not None and networking.http_route.hostnames:
        # The Gateway's listener terminates TLS. It is not known here; nearly all do.
        return f"https://{networking.http_route.hostnames[0]}"
    scheme = "http" if ctx.tls_secret is None else "https"
    return f"{scheme}://{service}.{ctx.namespace}.svc"


def ingress_objects(ctx: ModelContext) -> list[Object]:
    """Return the Ingress or HTTPRoutes of the spec; no HTTPRoutes without the Gateway API."""
    networking = ctx.spec.networking
    if networking.ingress is not None:
        return [_ingress(ctx, networking.ingress)]
    if networking.http_route is None or GATEWAY_API not in ctx.served_apis:
        return []
    route = networking.http_route
    return [
        _http_route(ctx, route, service=service_name(ctx.name), path=API_PATH),
        *(
            _http_route(
                ctx,
                route,
                service=tenant_service_name(ctx.name, tenant.name),
                path=tenant_path(tenant.name),
                tenant=tenant.name,
            )
            for tenant in ctx.spec.tenants
        ),
    ]


def _ingress(ctx: ModelContext, ingress: IngressSpec) -> Object:
    tenants = {
        tenant_path(tenant.name): tenant_service_name(ctx.name, tenant.name)
        for tenant in ctx.spec.tenants
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
            "backend": {"service": {"name": service, "port": {"name": SERVICE_PORT_NAME}}},
        }
        for path, service in paths.items()
    ]


def _http_route(
    ctx: ModelContext, route: HTTPRouteSpec, *, service: str, path: str, tenant: str = ""
) -> Object:
    backend = {"group": "", "kind": "Service", "name": service, "port": SERVICE_PORT, "weight": 1}
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
        extra_labels={TENANT_LABEL: tenant} if tenant else {},
        spec={"parentRefs": [_parent_ref(p) for p in route.parent_refs], **hosts, "rules": [rule]},
    )


def _parent_ref(parent: ParentReference) -> Object:
    return {"group": GATEWAY_GROUP, "kind": "Gateway", **parent.to_object()}


def store_policies(ctx: ModelContext) -> list[Object]:
    """Return the policies needed from the start: default deny, and egress of the store Job."""
    https_egress = {"ports": _ports(HTTPS_PORT)}
    return [
        _policy(ctx, default_deny_name(ctx.name), None, ingress=[], egress=[]),
        _policy(
            ctx,
            store_name(ctx.name),
            Component.STORE,
            ingress=[],
            egress=[_dns_egress(), https_egress],
        ),
    ]


def serving_policies(ctx: ModelContext) -> list[Object]:
    """Return the policies of routers, sandboxes and the store server."""
    from_clients = {"from": _peers(ctx.spec.networking.clients), "ports": _ports(ROUTER_PORT)}
    to_sandboxes = {
        "to": [_pods_peer(ctx, Component.SANDBOX)],
        "ports": _ports(SANDBOX_PORT),
    }
    to_control = {"to": [_operator_peer(ctx)], "ports": _ports(ctx.control.port)}
    from_callers = {
        "from": [_pods_peer(ctx, Component.ROUTER), _operator_peer(ctx)],
        "ports": _ports(SANDBOX_PORT),
    }
    return [
        _policy(
            ctx,
            router_name(ctx.name),
            Component.ROUTER,
            ingress=[
                from_clients,
                *_from_gateways(ctx),
                *_from_scrapers(ctx, router_metrics_port(ctx)),
            ],
            egress=[_dns_egress(), to_sandboxes, to_control, *_to_collector(ctx)],
        ),
        _policy(
            ctx,
            sandbox_name(ctx.name),
            Component.SANDBOX,
            ingress=[from_callers, *_from_scrapers(ctx, SANDBOX_METRICS_PORT)],
            egress=_to_store_server(ctx),
        ),
        *_store_server_policies(ctx),
    ]


def _to_store_server(ctx: ModelContext) -> list[Object]:
    """Return the egress of sandboxes: none, or to the store server by its name."""
    if not has_caches(ctx):
        return []
    server = {
        "to": [_pods_peer(ctx, Component.STORE_SERVER)],
        "ports": _ports(STORE_SERVER_PORT),
    }
    return [_dns_egress(), server]


def _store_server_policies(ctx: ModelContext) -> list[Object]:
    if not has_caches(ctx):
        return []
    from_sandboxes = {
        "from": [_pods_peer(ctx, Component.SANDBOX)],
        "ports": _ports(STORE_SERVER_PORT),
    }
    name = store_server_name(ctx.name)
    return [_policy(ctx, name, Component.STORE_SERVER, ingress=[from_sandboxes], egress=[])]


def _to_collector(ctx: ModelContext) -> list[Object]:
    """Return the rule for traces, which does not say where the collector is; none without any."""
    return [] if ctx.spec.tracing is None else [{"ports": _ports(ctx.spec.tracing.port)}]


def _from_gateways(ctx: ModelContext) -> list[Object]:
    """Return the rule for gateways, which `networking.clients` need not name; none without any."""
    if ctx.gateways is None:
        return []
    peer = _peer_pods(ctx.gateways.namespace, ctx.gateways.pod_labels)
    return [{"from": [peer], "ports": _ports(ROUTER_PORT)}]


def _from_scrapers(ctx: ModelContext, port: int) -> list[Object]:
    """Return the rule for those that may read metrics; none if nobody may."""
    peers = [peer.to_object() for peer in ctx.spec.monitoring.clients]
    # A rule with an empty `from` would allow everybody.
    return [{"from": peers, "ports": _ports(port)}] if peers else []


def _policy(
    ctx: ModelContext,
    name: str,
    component: Component | None,
    *,
    ingress: list[Object],
    egress: list[Object],
) -> Object:
    return new_object(
        ctx,
        NETWORK_POLICY,
        name,
        component=component,
        spec={
            "podSelector": {"matchLabels": pod_selector(ctx.name, component)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": ingress,
            "egress": egress,
        },
    )


def _peers(named: Sequence[NetworkPolicyPeer]) -> list[Object]:
    """Return peers; every pod of the cluster if none is named."""
    return [peer.to_object() for peer in named] or [{"namespaceSelector": {}}]


def _pods_peer(ctx: ModelContext, component: Component) -> Object:
    return {"podSelector": {"matchLabels": pod_selector(ctx.name, component)}}


def _operator_peer(ctx: ModelContext) -> Object:
    return _peer_pods(ctx.control.namespace, ctx.control.pod_labels)


def _peer_pods(namespace: str, labels: Mapping[str, str]) -> Object:
    return {
        "namespaceSelector": {"matchLabels": {NAMESPACE_LABEL: namespace}},
        "podSelector": {"matchLabels": dict(labels)},
    }


def _dns_egress() -> Object:
    return {"ports": [*_ports(*DNS_PORTS, protocol="UDP"), *_ports(*DNS_PORTS)]}


def _ports(*numbers: int, protocol: str = "TCP") -> list[dict[str, Any]]:
    return [{"protocol": protocol, "port": number} for number in numbers]


def service_monitors(ctx: ModelContext) -> list[Object]:
    """Return the ServiceMonitor if the spec requests it and the cluster serves its API."""
    monitor = ctx.spec.monitoring.service_monitor
    if monitor is None or MONITORING_API not in ctx.served_apis:
        return []
    # Tenants' Services select the same pods, which would be scraped several times.
    model_service_only = {"key": TENANT_LABEL, "operator": "DoesNotExist"}
    matching = {
        "matchLabels": pod_selector(ctx.name, Component.ROUTER),
        "matchExpressions": [model_service_only],
    }
    endpoint = {
        "port": METRICS_PORT_NAME,
        "path": METRICS_PATH,
        "interval": f"{monitor.interval_seconds}s",
    }
    return [
        new_object(
            ctx,
            SERVICE_MONITOR,
            router_name(ctx.name),
            component=Component.ROUTER,
            extra_labels=monitor.labels,
            spec={
                "selector": matching,
                "namespaceSelector": {"matchNames": [ctx.namespace]},
                "targetLabels": [MODEL_LABEL],
                "endpoints": [endpoint],
            },
        )
    ]


def pod_monitors(ctx: ModelContext) -> list[Object]:
    """Return the PodMonitor of routers and sandboxes; none unless requested and served."""
    monitor = ctx.spec.monitoring.pod_monitor
    if monitor is None or MONITORING_API not in ctx.served_apis:
        return []
    components = [Component.ROUTER.value, Component.SANDBOX.value]
    of_components = {"key": COMPONENT_LABEL, "operator": "In", "values": components}
    endpoint = {
        "port": METRICS_PORT_NAME,
        "path": METRICS_PATH,
        "interval": f"{monitor.interval_seconds}s",
    }
    return [
        new_object(
            ctx,
            POD_MONITOR,
            service_name(ctx.name),
            extra_labels=monitor.labels,
            spec={
                "selector": {
                    "matchLabels": pod_selector(ctx.name),
                    "matchExpressions": [of_components],
                },
                "namespaceSelector": {"matchNames": [ctx.namespace]},
                "podTargetLabels": [MODEL_LABEL, COMPONENT_LABEL],
                "podMetricsEndpoints": [endpoint],
            },
        )
    ]
