"""How a monitoring system finds and reaches a model's metrics. Kubernetes only.

Metrics tell what tenants use, so they have ports of their own, which clients of the API cannot
reach.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from faasmoe_operator.api.v1alpha1.base import ApiModel
from faasmoe_operator.api.v1alpha1.field_types import Labels
from faasmoe_operator.api.v1alpha1.networking import NetworkPolicyPeer

DEFAULT_SCRAPERS: list[dict[str, Any]] = [
    {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
]
"""Where Prometheus usually runs."""


class _Monitor(ApiModel):
    labels: Labels | None = Field(
        None, description="Labels by which a Prometheus selects the monitor."
    )
    interval_seconds: int = Field(30, ge=1, le=3600, description="Seconds between two scrapes.")


class ServiceMonitorSpec(_Monitor):
    """A ServiceMonitor of the Prometheus operator, created if the cluster serves its API."""


class PodMonitorSpec(_Monitor):
    """A PodMonitor of the Prometheus operator, created if the cluster serves its API."""


class MonitoringSpec(ApiModel):
    """Objects by which a monitoring system finds the model, and who may read its metrics."""

    service_monitor: ServiceMonitorSpec | None = Field(
        None, description="Set to {} to create a ServiceMonitor of the routers; omit for none."
    )
    pod_monitor: PodMonitorSpec | None = Field(
        None,
        description="Set to {} to create a PodMonitor of routers and sandboxes; omit for none.",
    )
    clients: tuple[NetworkPolicyPeer, ...] = Field(
        tuple(NetworkPolicyPeer.model_validate(peer) for peer in DEFAULT_SCRAPERS),
        strict=False,
        max_length=32,
        description="Pods that may reach the metrics of routers and sandboxes; those of the "
        "namespace monitoring if omitted, none if empty.",
        json_schema_extra={"default": DEFAULT_SCRAPERS},  # type: ignore[dict-item]
    )
