"""Where the traces of `faasmoe up` go: --otlp-endpoint, spec.tracing, or the environment."""

from __future__ import annotations

import argparse
import re

from faasmoe_operator.api.v1alpha1.patterns import DESCRIPTIONS, HTTP_URL
from faasmoe_operator.api.v1alpha1.tracing import (
    DEFAULT_SAMPLING_RATIO,
    RATIO_VARIABLE,
    TracingSpec,
)
from faasmoe_operator.errors import CommandError
from faasmoe_tracing.environment import INSTALL_HINT, is_installed


def add_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of tracing."""
    group.add_argument(
        "--otlp-endpoint",
        type=_url,
        metavar="URL",
        help="send traces to this OpenTelemetry collector with OTLP over HTTP, such as "
        "http://127.0.0.1:4318 (default: spec.tracing, or OTEL_EXPORTER_OTLP_ENDPOINT)",
    )
    group.add_argument(
        "--trace-ratio",
        type=_ratio,
        metavar="RATIO",
        help="part of the requests that are traced if their client has not decided that "
        f"(default: spec.tracing, OTEL_TRACES_SAMPLER_ARG, or {DEFAULT_SAMPLING_RATIO:g})",
    )


def tracing_variables(arguments: argparse.Namespace, spec: TracingSpec | None) -> dict[str, str]:
    """Return the variables that processes get beside those of this environment.

    Args:
        arguments: the command's arguments, which have precedence.
        spec: what a model's file says.

    Raises:
        CommandError: traces are asked for, but cannot be made.
    """
    variables = {} if spec is None else spec.variables
    if arguments.otlp_endpoint is not None:
        asked = TracingSpec.model_validate({"otlpEndpoint": arguments.otlp_endpoint})
        variables = {
            **asked.variables,
            **{k: v for k, v in variables.items() if k == RATIO_VARIABLE},
        }
    if arguments.trace_ratio is not None:
        variables[RATIO_VARIABLE] = f"{arguments.trace_ratio:g}"
    if (arguments.otlp_endpoint or spec) and not is_installed():
        asked_by = "--otlp-endpoint" if arguments.otlp_endpoint else "spec.tracing"
        raise CommandError(f"{asked_by}: OpenTelemetry is not installed: {INSTALL_HINT}")
    return variables


def _url(text: str) -> str:
    if not re.fullmatch(HTTP_URL, text):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {DESCRIPTIONS[HTTP_URL]}")
    return text


def _ratio(text: str) -> float:
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 0 to 1")
    return ratio
