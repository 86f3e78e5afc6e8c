"""How a Prometheus operator finds the routers' metrics."""

from __future__ import annotations

from faasmoe_operator.kube.kinds import SERVICE_MONITOR, Object
from faasmoe_operator.kube.manifests.context import MONITORING_API, ModelContext
from faasmoe_operator.kube.manifests.names import (
    MODEL_LABEL,
    TENANT_LABEL,
    Component,
    router_name,
    selector,
)
from faasmoe_operator.kube.manifests.objects import new_object
from faasmoe_operator.kube.manifests.services import PORT_NAME

METRICS_PATH = "/metrics"


def monitors(ctx: ModelContext) -> list[Object]:
    """Return the ServiceMonitor if it is asked for and the cluster can have it."""
    monitor = ctx.spec.monitoring.service_monitor
    if monitor is None or MONITORING_API not in ctx.api:
        return []
    # Tenants' Services have the same pods behind them: each would be scraped several times.
    once = {"key": TENANT_LABEL, "operator": "DoesNotExist"}
    matching = {"matchLabels": selector(ctx.name, Component.ROUTER), "matchExpressions": [once]}
    endpoint = {
        "port": PORT_NAME,
        "path": METRICS_PATH,
        "interval": f"{monitor.interval_seconds}s",
    }
    return [
        new_object(
            ctx,
            SERVICE_MONITOR,
            router_name(ctx.name),
            component=Component.ROUTER,
            more_labels=monitor.labels,
            spec={
                "selector": matching,
                "namespaceSelector": {"matchNames": [ctx.namespace]},
                "targetLabels": [MODEL_LABEL],
                "endpoints": [endpoint],
            },
        )
    ]
