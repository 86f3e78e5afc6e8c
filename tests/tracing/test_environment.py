"""Whether a process traces, and what that costs one that does not."""

import logging
import subprocess
import sys

import pytest

from faasmoe_tracing import NO_SPAN, NO_TRACER, create_tracer, is_requested
from faasmoe_tracing import environment as tracing_environment


@pytest.mark.parametrize(
    ("env", "requested"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"}, True),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "true"},
            False,
        ),
    ],
)
def test_an_endpoint_turns_tracing_on(env: dict[str, str], requested: bool) -> None:
    assert is_requested(env) == requested
    if not requested:
        assert create_tracer(env, service="s") is NO_TRACER


def test_without_the_package_the_process_serves_and_says_why_it_does_not_trace(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracing_environment, "EXPORTER_PACKAGE", "opentelemetry_absent.exporter")
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
    with caplog.at_level(logging.ERROR):
        assert create_tracer(env, service="s") is NO_TRACER
    assert "pip install 'faasmoe[tracing]'" in caplog.text


def test_a_span_that_is_not_recorded_does_nothing() -> None:
    with NO_TRACER.span("a", traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01") as span:
        assert span is NO_SPAN
        assert span.child("b") is span
        span.set({"a": 1})
        span.link("00-x")
        span.fail("error")
    assert (span.is_recorded, span.traceparent, span.trace_id) == (False, "", "")


def test_nothing_of_opentelemetry_is_imported_unless_asked_for() -> None:
    script = "import sys, faasmoe_tracing; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert not [name for name in done.stdout.split() if name.startswith("opentelemetry")]
