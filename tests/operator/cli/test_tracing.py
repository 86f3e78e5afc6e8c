"""--otlp-endpoint and --trace-ratio, and what they make of spec.tracing."""

import argparse

import pytest

from faasmoe_operator.api.v1alpha1.tracing import TracingSpec
from faasmoe_operator.cli import tracing
from faasmoe_operator.errors import CommandError

ENDPOINT, RATIO = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_TRACES_SAMPLER_ARG"
SPEC = TracingSpec.model_validate({"otlpEndpoint": "http://spec:4318", "samplingRatio": 0.5})


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    tracing.add_options(parser.add_argument_group("traces"))
    return parser.parse_args(words)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "is_installed", lambda: True)


@pytest.mark.parametrize(
    ("words", "spec", "expected"),
    [
        ((), None, {}),
        ((), SPEC, {ENDPOINT: "http://spec:4318", RATIO: "0.5"}),
        (("--otlp-endpoint", "http://a:1"), None, {ENDPOINT: "http://a:1", RATIO: "0.01"}),
        (("--otlp-endpoint", "http://a:1"), SPEC, {ENDPOINT: "http://a:1", RATIO: "0.5"}),
        (("--trace-ratio", "1"), SPEC, {ENDPOINT: "http://spec:4318", RATIO: "1"}),
        (("--trace-ratio", "1"), None, {RATIO: "1"}),
    ],
)
def test_options_have_precedence(
    words: tuple[str, ...], spec: TracingSpec | None, expected: dict[str, str]
) -> None:
    assert tracing.tracing_variables(parse(*words), spec) == expected


@pytest.mark.parametrize(
    "words", [("--otlp-endpoint", "localhost"), ("--trace-ratio", "2"), ("--trace-ratio", "nan")]
)
def test_a_value_that_is_none_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(argparse.ArgumentError, match="expected"):
        parse(*words)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "is_installed", lambda: False)
    with pytest.raises(CommandError, match=r"--otlp-endpoint: .*faasmoe\[tracing\]"):
        tracing.tracing_variables(parse("--otlp-endpoint", "http://a:1"), None)
    with pytest.raises(CommandError, match=r"spec.tracing: "):
        tracing.tracing_variables(parse(), SPEC)
    assert tracing.tracing_variables(parse(), None) == {}


@pytest.mark.parametrize(
    ("url", "port"), [("http://a:4318", 4318), ("http://a/otlp", 80), ("https://a", 443)]
)
def test_the_collector_s_port_is_known(url: str, port: int) -> None:
    assert TracingSpec.model_validate({"otlpEndpoint": url}).port == port
