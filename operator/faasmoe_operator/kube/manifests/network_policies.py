"""Who may talk to whom: what is not here is closed, both ways, for all pods of the model.

clients ──8000──▶ routers ──9090──▶ sandboxes ◀──9090── operator
                  routers ──control port──▶ operator         store's Job ──443──▶ anywhere
"""

from __future__ import annotations

from typing import Any

from faasmoe_operator.kube.kinds import NETWORK_POLICY, Object
from faasmoe_operator.kube.manifests import router, sandbox
from faasmoe_operator.kube.manifests.context import ModelContext
from faasmoe_operator.kube.manifests.names import (
    Component,
    default_deny_name,
    router_name,
    sandbox_name,
    selector,
    store_name,
)
from faasmoe_operator.kube.manifests.objects import new_object

NAMESPACE_LABEL = "kubernetes.io/metadata.name"
DNS_PORTS = (53, 5353)
"""Policies see a Service's target port, 5353 on OpenShift; node-local caches are no pods."""
HTTPS_PORT = 443


def store_policies(ctx: ModelContext) -> list[Object]:
    """Return what holds from the beginning: nothing is open, but for the store's Job."""
    fetch = {"ports": _ports(HTTPS_PORT)}
    return [
        _policy(ctx, default_deny_name(ctx.name), None, ingress=[], egress=[]),
        _policy(ctx, store_name(ctx.name), Component.STORE, ingress=[], egress=[_dns(), fetch]),
    ]


def serving_policies(ctx: ModelContext) -> list[Object]:
    """Return what routers and sandboxes may do."""
    from_clients = {"from": _clients(ctx), "ports": _ports(router.PORT)}
    to_sandboxes = {"to": [_pods(ctx, Component.SANDBOX)], "ports": _ports(sandbox.PORT)}
    to_control = {"to": [_operator(ctx)], "ports": _ports(ctx.control.port)}
    callers = {
        "from": [_pods(ctx, Component.ROUTER), _operator(ctx)],
        "ports": _ports(sandbox.PORT),
    }
    return [
        _policy(
            ctx,
            router_name(ctx.name),
            Component.ROUTER,
            ingress=[from_clients],
            egress=[_dns(), to_sandboxes, to_control],
        ),
        _policy(ctx, sandbox_name(ctx.name), Component.SANDBOX, ingress=[callers], egress=[]),
    ]


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
            "podSelector": {"matchLabels": selector(ctx.name, component)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": ingress,
            "egress": egress,
        },
    )


def _clients(ctx: ModelContext) -> list[Object]:
    named = [client.to_object() for client in ctx.spec.networking.clients]
    return named or [{"namespaceSelector": {}}]


def _pods(ctx: ModelContext, component: Component) -> Object:
    return {"podSelector": {"matchLabels": selector(ctx.name, component)}}


def _operator(ctx: ModelContext) -> Object:
    return {
        "namespaceSelector": {"matchLabels": {NAMESPACE_LABEL: ctx.control.namespace}},
        "podSelector": {"matchLabels": dict(ctx.control.pod_labels)},
    }


def _dns() -> Object:
    return {"ports": [*_ports(*DNS_PORTS, protocol="UDP"), *_ports(*DNS_PORTS)]}


def _ports(*numbers: int, protocol: str = "TCP") -> list[dict[str, Any]]:
    return [{"protocol": protocol, "port": number} for number in numbers]
