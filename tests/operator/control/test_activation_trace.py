"""One activation at a time, with its steps, and nothing that names a function."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from recorded_span import RecordedSpan

from faasmoe_operator.control.activation_trace import ActivationTrace
from faasmoe_tracing import Attribute, Span, SpanKind, Tracer


@dataclass
class RecordingTracer(Tracer):
    spans: list[RecordedSpan] = field(default_factory=list)

    def span(
        self,
        name: str,
        *,
        traceparent: str = "",
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Mapping[str, Attribute] | None = None,
        start_ns: int | None = None,
    ) -> Span:
        self.spans.append(RecordedSpan(name, start_ns, dict(attributes or {})))
        return self.spans[-1]


def seconds(span: RecordedSpan) -> float:
    assert span.start_ns is not None
    assert span.end_ns is not None
    return round((span.end_ns - span.start_ns) / 1e9, 2)


def test_an_activation_has_its_steps() -> None:
    tracer = RecordingTracer()
    trace = ActivationTrace(tracer, "tiny")
    trace.begin(["f0", "f1"], traceparent="00-a", started_s=10.0, now_s=10.0)
    trace.record_plan(10.1)
    trace.record_plan(10.2)  # later plans are part of placing
    trace.record_attach("other", 10.25)
    trace.record_attach("f0", 10.4)
    trace.record_attached("f0", 0.3)
    trace.record_ready(["f0", "other"], 10.8)
    assert not tracer.spans[0].is_ended
    trace.record_ready(["f1"], 11.0)
    (activation,) = tracer.spans
    assert activation.is_ended
    assert seconds(activation) == 1.0  # the sum of its steps, whenever the span is written
    assert [(s.name, seconds(s)) for s in activation.children] == [
        ("wake", 0.1),
        ("place", 0.3),
        ("attach", 0.6),
    ]
    assert activation.children[2].attributes == {
        "faasmoe.functions": 2,
        "faasmoe.longest_attach_ms": 300.0,
    }


def test_functions_asked_for_meanwhile_join_the_activation() -> None:
    tracer = RecordingTracer()
    trace = ActivationTrace(tracer, "tiny")
    trace.begin(["f0"], traceparent="00-a", started_s=1.0, now_s=1.0)
    trace.begin(["f1"], traceparent="00-b", started_s=1.0, now_s=1.5)
    trace.record_ready(["f0"], 2.0)
    assert not tracer.spans[0].is_ended
    trace.record_ready(["f1"], 3.0)
    assert [span.is_ended for span in tracer.spans] == [True]


def test_functions_that_are_given_up_end_it_with_an_error() -> None:
    tracer = RecordingTracer()
    trace = ActivationTrace(tracer, "tiny")
    trace.begin(["f0"], traceparent="00-a", started_s=1.0, now_s=1.0)
    trace.record_abandoned(["f1"], 2.0)
    assert not tracer.spans[0].is_ended
    trace.record_abandoned(["f0"], 2.0)
    assert (tracer.spans[0].error, tracer.spans[0].is_ended) == ("timeout", True)
    trace.begin(["f0"], traceparent="00-a", started_s=3.0, now_s=3.0)
    assert len(tracer.spans) == 2


def test_what_nobody_traces_is_not_followed() -> None:
    tracer = RecordingTracer()
    trace = ActivationTrace(tracer, "tiny")
    trace.begin(["f0"], traceparent="", started_s=1.0, now_s=1.0)
    trace.begin([], traceparent="00-a", started_s=1.0, now_s=1.0)
    assert tracer.spans == []


def test_nothing_names_a_function() -> None:
    tracer = RecordingTracer()
    trace = ActivationTrace(tracer, "tiny")
    trace.begin(["secret-function"], traceparent="00-a", started_s=1.0, now_s=1.0)
    trace.record_attach("secret-function", 1.5)
    trace.record_ready(["secret-function"], 2.0)
    assert "secret-function" not in repr(tracer.spans)
