"""Spans of the SDK: parents, sampling, and a collector that does not answer."""

import socket
import time
from collections.abc import Iterator

import pytest
from otlp_collector import OtlpCollector, running_collector

pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

from faasmoe_tracing import Tracer, create_tracer, epoch_ns

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-01", f"00-{TRACE_ID}-{PARENT_ID}-00"


@pytest.fixture
def collector() -> Iterator[OtlpCollector]:
    with running_collector() as collector:
        yield collector


def make_tracer(monkeypatch: pytest.MonkeyPatch, url: str, *, ratio: str = "1") -> Tracer:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_TRACES_SAMPLER_ARG": ratio}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return create_tracer(env, service="faasmoe-test")


def test_spans_arrive_as_a_tree(monkeypatch: pytest.MonkeyPatch, collector: OtlpCollector) -> None:
    tracer = make_tracer(monkeypatch, collector.url)
    with tracer.span("outer", traceparent=SAMPLED, attributes={"a": 1}) as outer:
        child = outer.child("inner", start_ns=epoch_ns(1.0, now_s=3.0))
        child.link(SAMPLED)
        child.end(epoch_ns(2.0, now_s=3.0))
        child.end()  # only the first end counts
    tracer.close()
    inner, root = collector.spans
    assert (root.name, root.trace_id, root.parent_id) == ("outer", TRACE_ID, PARENT_ID)
    assert (inner.parent_id, inner.links) == (root.span_id, ((TRACE_ID, PARENT_ID),))
    assert inner.seconds == pytest.approx(1.0, abs=0.1)
    assert root.attributes == {"a": 1}
    assert outer.trace_id == TRACE_ID


def test_an_exception_is_the_span_s_error(
    monkeypatch: pytest.MonkeyPatch, collector: OtlpCollector
) -> None:
    tracer = make_tracer(monkeypatch, collector.url)
    with pytest.raises(KeyError), tracer.span("outer"):
        raise KeyError
    tracer.close()
    (span,) = collector.spans
    assert (span.is_error, span.attributes) == (True, {"error.type": "KeyError"})


@pytest.mark.parametrize(("parent", "ratio"), [(UNSAMPLED, "1"), ("", "0"), ("garbage", "0")])
def test_an_unsampled_span_only_hands_on_the_decision(
    monkeypatch: pytest.MonkeyPatch, collector: OtlpCollector, parent: str, ratio: str
) -> None:
    tracer = make_tracer(monkeypatch, collector.url, ratio=ratio)
    with tracer.span("outer", traceparent=parent) as span:
        assert not span.is_recorded
        assert span.child("inner") is span
        assert not int(span.traceparent[-2:], 16) & 1  # the flag "sampled"
        assert (TRACE_ID in span.traceparent) == (parent == UNSAMPLED)
    tracer.close()
    assert collector.spans == []


def test_nobody_waits_for_a_collector_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and answers nothing
        tracer = make_tracer(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        for _ in range(5000):  # more than the queue holds
            tracer.span("a").end()
        started_s = time.monotonic()
        tracer.close()
        assert time.monotonic() - started_s < 10  # its own bound is 2 s


def test_a_ratio_that_is_none_is_said_and_nothing_is_traced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracer = make_tracer(monkeypatch, "http://127.0.0.1:4318", ratio="all")
    assert not tracer.is_enabled
    assert "OTEL_TRACES_SAMPLER_ARG: got 'all', expected 0 to 1" in caplog.text
