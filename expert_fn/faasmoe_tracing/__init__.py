"""Traces: spans of requests, activations and reconciles, exported to an OpenTelemetry collector.

Off by default, and then nothing but the standard library is imported: `Tracer` and `Span` do
nothing. `create_tracer` returns one that exports if an endpoint is set. Every package may import
this one; it imports none.
"""

from faasmoe_tracing.environment import create_tracer, is_requested
from faasmoe_tracing.spans import (
    NO_SPAN,
    NO_TRACER,
    TRACEPARENT,
    Attribute,
    Span,
    SpanKind,
    Tracer,
    epoch_ns,
)

__all__ = [
    "NO_SPAN",
    "NO_TRACER",
    "TRACEPARENT",
    "Attribute",
    "Span",
    "SpanKind",
    "Tracer",
    "create_tracer",
    "epoch_ns",
    "is_requested",
]
