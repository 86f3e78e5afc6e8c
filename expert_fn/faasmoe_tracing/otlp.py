"""Spans of the OpenTelemetry SDK, exported with OTLP over HTTP.

Fail-open and bounded: ended spans wait in a queue of fixed length, which a thread of the SDK's
empties; what does not fit, or what the collector does not take in time, is dropped. Sampling is
decided once per trace, by whoever begins it (`parentbased_traceidratio`), and an unsampled request
costs the parsing of one header: its spans are all the same object.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from faasmoe_tracing.spans import TRACEPARENT, Attribute, Span, SpanKind, Tracer

DEFAULT_RATIO = 0.01
SAMPLER_VARIABLE, RATIO_VARIABLE = "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG"
CLOSE_TIMEOUT_S = 2.0
_PROPAGATOR = TraceContextTextMapPropagator()
_KINDS = {
    SpanKind.INTERNAL: trace.SpanKind.INTERNAL,
    SpanKind.SERVER: trace.SpanKind.SERVER,
    SpanKind.CLIENT: trace.SpanKind.CLIENT,
}


class OtlpTracer(Tracer):
    """A tracer that exports.

    Args:
        service: name of the kind of process.
    """

    def __init__(self, *, service: str) -> None:
        self._provider = TracerProvider(
            sampler=_sampler(os.environ),
            resource=Resource.create({"service.name": service}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("faasmoe")

    @property
    def is_enabled(self) -> bool:
        """Whether spans may be recorded."""
        return True

    def span(
        self,
        name: str,
        *,
        traceparent: str = "",
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Mapping[str, Attribute] | None = None,
        start_ns: int | None = None,
    ) -> Span:
        """Begin a span of this process; see `Tracer.span`."""
        context = _PROPAGATOR.extract({TRACEPARENT: traceparent})
        span = self._tracer.start_span(
            name, context, _KINDS[kind], attributes or {}, start_time=start_ns
        )
        if not span.is_recording():
            return _UnsampledSpan(_traceparent(span))
        return _RecordedSpan(self._tracer, span)

    def close(self) -> None:
        """Export what is left, for two seconds at most."""
        worker = threading.Thread(target=self._provider.shutdown, daemon=True)
        worker.start()
        worker.join(CLOSE_TIMEOUT_S)


class _UnsampledSpan(Span):
    """A span that only hands on the decision not to record its trace."""

    __slots__ = ("_traceparent",)

    def __init__(self, traceparent: str) -> None:
        self._traceparent = traceparent

    @property
    def traceparent(self) -> str:
        return self._traceparent


class _RecordedSpan(Span):
    """A span of the SDK."""

    __slots__ = ("_span", "_tracer")

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer = tracer
        self._span = span

    @property
    def is_recorded(self) -> bool:
        return True

    @property
    def traceparent(self) -> str:
        return _traceparent(self._span)

    @property
    def trace_id(self) -> str:
        return str(trace.format_trace_id(self._span.get_span_context().trace_id))

    def child(
        self,
        name: str,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Mapping[str, Attribute] | None = None,
        start_ns: int | None = None,
    ) -> Span:
        context = trace.set_span_in_context(self._span)
        span = self._tracer.start_span(
            name, context, _KINDS[kind], attributes or {}, start_time=start_ns
        )
        return _RecordedSpan(self._tracer, span)

    def set(self, attributes: Mapping[str, Attribute]) -> None:
        self._span.set_attributes(attributes)

    def link(self, traceparent: str) -> None:
        context = trace.get_current_span(
            _PROPAGATOR.extract({TRACEPARENT: traceparent})
        ).get_span_context()
        if context.is_valid:
            self._span.add_link(context)

    def fail(self, error_type: str) -> None:
        self._span.set_attribute("error.type", error_type)
        self._span.set_status(trace.StatusCode.ERROR)

    def end(self, end_ns: int | None = None) -> None:
        if self._span.is_recording():
            self._span.end(end_ns)


def _sampler(env: Mapping[str, str]) -> Sampler | None:
    """Return the sampler; None leaves it to the SDK, if its variable names one."""
    if env.get(SAMPLER_VARIABLE):
        return None
    text = env.get(RATIO_VARIABLE) or str(DEFAULT_RATIO)
    try:
        return ParentBased(TraceIdRatioBased(float(text)))
    except ValueError:
        raise ValueError(f"{RATIO_VARIABLE}: got {text!r}, expected 0 to 1") from None


def _traceparent(span: trace.Span) -> str:
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
    return carrier.get(TRACEPARENT, "")
