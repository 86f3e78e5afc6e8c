"""Traffic: a trace of requests, or a profile from which one is drawn with a seed.

A trace is CSV with a header, or JSON lines. Its columns are those of the public Azure LLM inference
traces, TIMESTAMP, ContextTokens and GeneratedTokens, or arrival_s, prompt_tokens and output_tokens;
`tenant` is optional. Timestamps are seconds or ISO 8601.
"""

from __future__ import annotations

import bisect
import csv
import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from benchmarks.simulation.errors import SimulationError
from pydantic import Field, ValidationError

from faasmoe_operator.api.v1alpha1.base import ApiModel
from faasmoe_operator.api.v1alpha1.field_types import ByteQuantity, quantity_to_bytes
from faasmoe_operator.api.v1alpha1.validation import format_validation_errors

HOUR_S = 3600.0
# A working day: quiet nights, two peaks, a late batch; as in the evaluation's bursty day.
WORKING_DAY = (0, 0, 0, 0, 0, 0, 1, 3, 6, 9, 8, 5, 3, 6, 9, 8, 6, 4, 2, 1, 0, 0, 2, 0)
COLUMNS = {
    "arrival_s": ("arrival_s", "TIMESTAMP"),
    "n_prompt": ("prompt_tokens", "ContextTokens"),
    "n_output": ("output_tokens", "GeneratedTokens"),
}


@dataclass(frozen=True, slots=True)
class TrafficRequest:
    """One request.

    Attributes:
        number: index in the trace.
        arrival_s: seconds since the start of the trace.
        tenant: who sends it.
        n_prompt: tokens of the prompt, 1 or more.
        n_output: tokens generated, 1 or more.
    """

    number: int
    arrival_s: float
    tenant: str
    n_prompt: int
    n_output: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests in the order of arrival, over `duration_s` seconds; the end may be idle."""

    requests: tuple[TrafficRequest, ...]
    duration_s: float


class TokensSpec(ApiModel):
    """Numbers of tokens, drawn from a log-normal distribution."""

    median: float = Field(gt=0, le=1_000_000)
    p95: float = Field(gt=0, le=10_000_000)
    max: int = Field(32768, ge=1, le=10_000_000)

    def draw(self, source: random.Random) -> int:
        """Return a number of tokens, from 1 to `max`."""
        sigma = max(0.0, math.log(self.p95 / self.median)) / 1.6449
        return max(1, min(self.max, round(source.lognormvariate(math.log(self.median), sigma))))


class TrafficSpec(ApiModel):
    """Requests of a period: a rate that follows the hours, with tenants of unequal size."""

    requests_per_day: Annotated[int, Field(ge=1, le=100_000_000)]
    days: Annotated[float, Field(gt=0, le=366)] = 1.0
    tenants: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    tenant_skew: Annotated[float, Field(ge=0, le=4)] = 1.0
    hourly_weights: tuple[Annotated[float, Field(ge=0)], ...] = Field(WORKING_DAY, strict=False)
    burst_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    prompt_tokens: TokensSpec
    output_tokens: TokensSpec


class ClusterSpec(ApiModel):
    """The nodes that everything runs on."""

    nodes: Annotated[int, Field(ge=1, le=100_000)] = 1
    node_memory: ByteQuantity = "64Gi"
    packing: Literal["MostAllocated", "LeastAllocated"] = "MostAllocated"
    node_speed: Annotated[float, Field(gt=0, le=100_000)] = 1.0
    weights_bytes_per_second: Annotated[float, Field(gt=0)] | None = None
    network_round_trip_seconds: Annotated[float, Field(ge=0, le=10)] = 0.0002
    activation_timeout_seconds: Annotated[float, Field(gt=0, le=86400)] = 30.0
    routers: Annotated[int, Field(ge=1, le=10_000)] = 1
    min_routers: Annotated[int, Field(ge=0, le=10_000)] | None = None
    losses: tuple[NodeLossSpec, ...] = Field((), strict=False, max_length=1000)

    @property
    def node_memory_bytes(self) -> int:
        """Memory of a node in bytes."""
        return quantity_to_bytes(self.node_memory)


class NodeLossSpec(ApiModel):
    """Nodes that fail at one time, those with the most memory in use first."""

    at_seconds: Annotated[float, Field(ge=0)]
    nodes: Annotated[int, Field(ge=1, le=100_000)] = 1


class PricesSpec(ApiModel):
    """Prices of what the simulation counts, in any currency."""

    node_hour: Annotated[float, Field(ge=0)] = 0.0
    gigabyte_hour: Annotated[float, Field(ge=0)] = 0.0


class Profile(ApiModel):
    """A profile file: traffic to draw, the cluster and prices."""

    kind: Literal["TrafficProfile"] = "TrafficProfile"
    traffic: TrafficSpec | None = None
    cluster: ClusterSpec = Field(default_factory=lambda: ClusterSpec.model_validate({}))
    prices: PricesSpec = Field(default_factory=lambda: PricesSpec.model_validate({}))


def load_profile(path: Path) -> Profile:
    """Read a profile; raises SimulationError naming the field."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SimulationError("profile", got=str(path), expected="a YAML file") from error
    try:
        profile = Profile.model_validate(value)
    except ValidationError as error:
        raise ProfileError(path, format_validation_errors(error, Profile)) from error
    weights = profile.traffic.hourly_weights if profile.traffic else WORKING_DAY
    if len(weights) != 24 or not any(weights):
        expected = "24 numbers, at least one of them above 0"
        raise SimulationError("traffic.hourlyWeights", got=weights, expected=expected)
    return profile


class ProfileError(SimulationError):
    """A profile with invalid fields; the message has one line for each."""

    def __init__(self, path: Path, problems: Sequence[str]) -> None:
        Exception.__init__(self, "\n".join(f"{path}: {problem}" for problem in problems))


def draw_traffic(spec: TrafficSpec, *, seed: int) -> Traffic:
    """Draw the requests of a profile; the same seed draws the same ones.

    The requests of an hour arrive in its first `burst_fraction`. A tenant's part of them is
    1 / rank ** tenant_skew (Zipf), so 0 makes all tenants equal.
    """
    source = random.Random(f"traffic {seed}")
    n_hours = max(1, math.ceil(spec.days * 24))
    weights = [spec.hourly_weights[hour % 24] for hour in range(n_hours)]
    n_requests = max(1, round(spec.requests_per_day * spec.days))
    hours = source.choices(range(n_hours), weights, k=n_requests)
    length_s = spec.burst_fraction * HOUR_S
    times = sorted(hour * HOUR_S + source.random() * length_s for hour in hours)
    shares = list(
        itertools.accumulate((rank + 1) ** -spec.tenant_skew for rank in range(spec.tenants))
    )
    requests = tuple(
        TrafficRequest(
            number,
            arrival_s,
            f"tenant-{bisect.bisect_left(shares, source.random() * shares[-1])}",
            spec.prompt_tokens.draw(source),
            spec.output_tokens.draw(source),
        )
        for number, arrival_s in enumerate(times)
    )
    return Traffic(requests, n_hours * HOUR_S)


def read_trace(path: Path, *, tenants: int = 1, seed: int = 1) -> Traffic:
    """Read a trace.

    Args:
        path: the CSV or JSON lines file.
        tenants: how many tenants to spread requests over that name none.
        seed: seed of that.

    Raises:
        SimulationError: a line has no or an invalid value; its number is in the message.
    """
    source = random.Random(f"trace {seed}")
    rows: list[tuple[float, str, int, int]] = []
    for line, row in _rows(path):
        tenant = str(row.get("tenant") or f"tenant-{source.randrange(tenants)}")
        n_prompt, n_output = (_tokens(row, name, line) for name in ("n_prompt", "n_output"))
        rows.append((_arrival_s(row, line), tenant, n_prompt, n_output))
    if not rows:
        raise SimulationError("trace", got=f"no request in {path}", expected="one or more")
    rows.sort(key=lambda row: row[0])
    start_s = rows[0][0] if rows[0][0] >= 1e8 else 0.0  # a date, not seconds since the start
    requests = tuple(
        TrafficRequest(number, at_s - start_s, tenant, n_prompt, n_output)
        for number, (at_s, tenant, n_prompt, n_output) in enumerate(rows)
    )
    return Traffic(requests, requests[-1].arrival_s)


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            first = file.read(1)
            file.seek(0)
            yield from enumerate(_json_lines(file) if first == "{" else csv.DictReader(file), 2)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SimulationError("trace", got=str(path), expected="a readable text file") from error


def _json_lines(lines: Iterable[str]) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            expected = "a JSON object"
            raise SimulationError(
                f"trace line {number}", got=line[:40], expected=expected
            ) from error
        if not isinstance(row, dict):
            raise SimulationError(f"trace line {number}", got=row, expected="a JSON object")
        yield row


def _value(row: Mapping[str, Any], name: str, line: int) -> Any:
    for column in COLUMNS[name]:
        if row.get(column) not in (None, ""):
            return row[column]
    expected = " or ".join(COLUMNS[name])
    raise SimulationError(f"trace line {line}", got=sorted(map(str, row)), expected=expected)


def _tokens(row: Mapping[str, Any], name: str, line: int) -> int:
    value = _value(row, name, line)
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = -1
    if number < 0:
        raise SimulationError(
            f"trace line {line} {COLUMNS[name][0]}", got=value, expected="an integer of 0 or more"
        )
    return max(1, number)


def _arrival_s(row: Mapping[str, Any], line: int) -> float:
    value = _value(row, "arrival_s", line)
    try:
        arrival_s = float(value)
    except (TypeError, ValueError):
        arrival_s = _timestamp_s(value, line)
    if not math.isfinite(arrival_s) or arrival_s < 0:
        raise SimulationError(f"trace line {line} arrival_s", got=value, expected="0 s or more")
    return arrival_s


def _timestamp_s(value: object, line: int) -> float:
    try:
        text = str(value)
        head, dot, fraction = text.partition(".")
        return datetime.fromisoformat(head + dot + fraction[:6]).timestamp()
    except ValueError as error:
        expected = "seconds or an ISO 8601 time"
        raise SimulationError(
            f"trace line {line} TIMESTAMP", got=value, expected=expected
        ) from error


ClusterSpec.model_rebuild()
