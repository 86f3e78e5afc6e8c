"""Whether and where to export spans: OpenTelemetry's own environment variables.

`OTEL_EXPORTER_OTLP_ENDPOINT` (or `..._TRACES_ENDPOINT`) turns tracing on; `OTEL_SDK_DISABLED=true`
turns it off. The SDK itself reads the others: headers, certificates, time-outs, the queue's bounds.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping

from faasmoe_tracing.spans import NO_TRACER, Tracer

logger = logging.getLogger(__name__)

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
DISABLED_VARIABLE = "OTEL_SDK_DISABLED"
EXPORTER_PACKAGE = "opentelemetry.exporter.otlp.proto.http"
INSTALL_HINT = "pip install 'faasmoe[tracing]'"


def is_requested(env: Mapping[str, str]) -> bool:
    """Return whether an environment names a collector."""
    if env.get(DISABLED_VARIABLE, "").lower() == "true":
        return False
    return any(env.get(name) for name in ENDPOINT_VARIABLES)


def is_installed() -> bool:
    """Return whether the OpenTelemetry SDK and its exporter are installed."""
    try:
        return importlib.util.find_spec(EXPORTER_PACKAGE) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False


def create_tracer(env: Mapping[str, str], *, service: str) -> Tracer:
    """Return the tracer of a process; it does nothing if no collector is named.

    Tracing never keeps a process from serving: what is wrong with it is logged.

    Args:
        env: the process's environment.
        service: name of the kind of process, such as faasmoe-router.
    """
    if not is_requested(env):
        return NO_TRACER
    if not is_installed():
        logger.error("No traces: OpenTelemetry is not installed (%s)", INSTALL_HINT)
        return NO_TRACER
    from faasmoe_tracing.otlp import OtlpTracer

    try:
        return OtlpTracer(service=service)
    except ValueError as error:  # a variable that the SDK cannot read
        logger.error("No traces: %s", error)
        return NO_TRACER
