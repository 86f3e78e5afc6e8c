"""How the model's metrics are found. Kubernetes only."""

from __future__ import annotations

from pydantic import Field

from faasmoe_operator.spec.base import Part
from faasmoe_operator.spec.references import Labels


class ServiceMonitor(Part):
    """A ServiceMonitor of the Prometheus operator, made if its API is there."""

    labels: Labels | None = Field(None, description="By which a Prometheus selects it.")
    interval_seconds: int = Field(30, ge=1, le=3600)


class Monitoring(Part):
    """Objects that tell a monitoring system of the model."""

    service_monitor: ServiceMonitor | None = Field(
        None, description="{} makes one; none is made if left out."
    )
