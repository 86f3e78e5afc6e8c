"""Where traces go: an OpenTelemetry collector, and how many requests are traced."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import Field

from faasmoe_operator.api.v1alpha1.base import ApiModel
from faasmoe_operator.api.v1alpha1.patterns import HTTP_URL

DEFAULT_SAMPLING_RATIO = 0.01
ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
RATIO_VARIABLE = "OTEL_TRACES_SAMPLER_ARG"
DEFAULT_PORTS = {"http": 80, "https": 443}


class TracingSpec(ApiModel):
    """Traces of requests and activations, sent with OTLP over HTTP."""

    otlp_endpoint: Annotated[str, Field(pattern=HTTP_URL, max_length=2048)] = Field(
        description="Base URL of the collector, such as http://otel-collector.monitoring.svc:4318; "
        "/v1/traces is appended."
    )
    sampling_ratio: float = Field(
        DEFAULT_SAMPLING_RATIO,
        ge=0,
        le=1,
        strict=False,
        description="Part of the requests that are traced if their client has not decided that.",
    )

    @property
    def port(self) -> int:
        """The collector's port."""
        parts = urlsplit(self.otlp_endpoint)
        return parts.port or DEFAULT_PORTS[parts.scheme]

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables by which a process traces."""
        return {
            ENDPOINT_VARIABLE: self.otlp_endpoint,
            RATIO_VARIABLE: f"{self.sampling_ratio:g}",
        }
