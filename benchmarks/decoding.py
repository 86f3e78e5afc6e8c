"""Measurement of one batch: records every step and evaluates those in which all requests decode.

Baseline and FaaSMoE both use it, so that they are measured the same way. The module itself does no
I/O; clocks and counters are passed in as `read_resources`.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Protocol

WARM_UP_STEPS = 1  # the first decode step runs on caches left by prefill


@dataclass(frozen=True, slots=True)
class ResourceReading:
    """Wall clock, CPU time and other cumulative counters at one moment."""

    time_s: float
    cpu_s: float
    counters: Mapping[str, float] = field(default_factory=dict)


class StepOutput(Protocol):
    """The output of one request after a step, as transformers reports it."""

    request_id: str
    generated_tokens: list[int]
    error: str | None


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """The result of one batch.

    Attributes:
        batch: number of requests.
        steps: measured decode steps, each one token per request.
        time_s: wall time of the measured steps.
        cpu_s: CPU time of all processes of the system during the measured steps.
        counters: increase of the other counters during the measured steps.
        tokens: all generated tokens of each request, in the order of the prompts.
        ttft_s: median time from the start of the batch to a request's first token.
    """

    batch: int
    steps: int
    time_s: float
    cpu_s: float
    counters: Mapping[str, float]
    tokens: tuple[tuple[int, ...], ...]
    ttft_s: float = 0.0

    @property
    def step_ms(self) -> float:
        """Time per step, which is the time per token of each request."""
        return self.time_s / self.steps * 1e3

    @property
    def tokens_per_s(self) -> float:
        """Throughput of all requests together."""
        return self.batch * self.steps / self.time_s

    @property
    def cpu_ms_per_token(self) -> float:
        """CPU time per token."""
        return self.cpu_s / (self.batch * self.steps) * 1e3

    @property
    def calls_per_token(self) -> float:
        """Function calls per token."""
        return self.counters["calls"] / (self.batch * self.steps)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that a worker sends."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DecodeRun:
        """Parse the JSON object that a worker sends."""
        return cls(**{**value, "tokens": tuple(map(tuple, value["tokens"]))})


class RunRecorder:
    """Records the outputs of a batch step by step until every request is complete.

    `record_step` and `fail` are called from the engine's thread, `start` and `wait` from the main
    thread.

    Args:
        read_resources: returns clocks and counters of the current moment.
    """

    def __init__(self, read_resources: Callable[[], ResourceReading]) -> None:
        self._read_resources = read_resources
        self._run_numbers = itertools.count()
        self._tokens: dict[str, list[int]] = {}
        self._readings: list[tuple[ResourceReading, int, int]] = []
        self._max_tokens = 0
        self._started_s = 0.0
        self._first_token_s: dict[str, float] = {}
        self._error: str | None = None
        self._done = threading.Event()

    def start(self, n_requests: int, *, max_tokens: int) -> list[str]:
        """Reset the recorder; return the ids to use for the requests of the next batch."""
        number = next(self._run_numbers)
        self._tokens = {f"run{number}-{i}": [] for i in range(n_requests)}
        self._readings, self._max_tokens, self._error = [], max_tokens, None
        self._done.clear()
        self._started_s, self._first_token_s = self._read_resources().time_s, {}
        return list(self._tokens)

    def fail(self, request_ids: Sequence[str], error: Exception) -> None:
        """Record that requests failed; `wait` will raise."""
        self._error = f"{len(request_ids)} requests: {error}"
        self._done.set()

    def record_step(self, outputs: Sequence[StepOutput]) -> None:
        """Record the outputs of one step."""
        reading = self._read_resources()
        for output in outputs:
            if output.error is not None:
                self._error = output.error
                self._done.set()
            if output.request_id in self._tokens:
                self._tokens[output.request_id] = list(output.generated_tokens)
                self._first_token_s.setdefault(output.request_id, reading.time_s - self._started_s)
        lengths = [len(tokens) for tokens in self._tokens.values()]
        self._readings.append((reading, min(lengths), max(lengths)))
        if min(lengths) >= self._max_tokens:
            self._done.set()

    def wait(self, timeout_s: float) -> DecodeRun:
        """Wait for the last token and return the result.

        Raises:
            RuntimeError: a request failed, the batch took longer than timeout_s seconds, or it was
                too short to have steps in which all requests decode.
        """
        if not self._done.wait(timeout_s):
            raise RuntimeError(f"the batch did not finish within {timeout_s:g} s")
        if self._error is not None:
            raise RuntimeError(f"a request failed: {self._error}")
        first, last, steps = self._decode_window()
        return DecodeRun(
            batch=len(self._tokens),
            steps=steps,
            time_s=last.time_s - first.time_s,
            cpu_s=last.cpu_s - first.cpu_s,
            counters={k: last.counters[k] - first.counters[k] for k in first.counters},
            tokens=tuple(tuple(tokens) for tokens in self._tokens.values()),
            ttft_s=median(self._first_token_s.values()),
        )

    def _decode_window(self) -> tuple[ResourceReading, ResourceReading, int]:
        """Return the readings between which all requests decode, and the steps in between."""
        lengths = [(low, high) for _, low, high in self._readings]
        start = next(i for i, (low, _) in enumerate(lengths) if low >= 1) + WARM_UP_STEPS
        stop = next(i for i, (_, high) in enumerate(lengths) if high >= self._max_tokens)
        if stop <= start:
            raise RuntimeError(
                f"max_tokens: got {self._max_tokens}, expected more: no step has all requests "
                "decoding"
            )
        return self._readings[start][0], self._readings[stop][0], stop - start


def equal_token_fraction(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> float:
    """Return the fraction of all tokens that precede their request's first difference."""
    agreed = sum(
        sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=True)))
        for a, b in zip(first, second, strict=True)
    )
    return agreed / sum(map(len, first))
