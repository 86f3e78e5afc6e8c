"""One run of a batch: what came when, and the part of it in which every request decodes.

Used by both sides of the comparison, so that both are measured by the same ruler. Pure but for the
meter that it is given.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Protocol

WARM_UP_STEPS = 1  # the first decode step still meets the prefill's cold caches


@dataclass(frozen=True, slots=True)
class ResourceReading:
    """What a side has used at one moment: wall clock, processor time, and what else it counts."""

    time_s: float
    cpu_s: float
    counters: Mapping[str, float] = field(default_factory=dict)


class StepOutput(Protocol):
    """What transformers hands out of one request after a step."""

    request_id: str
    generated_tokens: list[int]
    error: str | None


@dataclass(frozen=True, slots=True)
class DecodeRun:
    """What one run of a batch gave.

    Attributes:
        batch: requests in it.
        steps: decode steps measured, each of one token for every request.
        time_s: what they took.
        cpu_s: processor time of every process of the side in them.
        counters: what the side counted in them.
        tokens: everything generated, for each request in the order of the prompts.
        ttft_s: from the batch's begin to a request's first token, the median of the requests.
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
        """Time of one step, which is each request's time per token."""
        return self.time_s / self.steps * 1e3

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all requests in a second."""
        return self.batch * self.steps / self.time_s

    @property
    def cpu_ms_per_token(self) -> float:
        """Processor time of one token."""
        return self.cpu_s / (self.batch * self.steps) * 1e3

    @property
    def calls_per_token(self) -> float:
        """Calls to functions for one token."""
        return self.counters["calls"] / (self.batch * self.steps)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that a worker answers with."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DecodeRun:
        """Read a worker's answer."""
        return cls(**{**value, "tokens": tuple(map(tuple, value["tokens"]))})


class RunRecorder:
    """Takes a run's outputs, step by step, until every request has all its tokens."""

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
        """Forget the last run; return the ids under which the requests are to be added."""
        number = next(self._run_numbers)
        self._tokens = {f"run{number}-{i}": [] for i in range(n_requests)}
        self._readings, self._max_tokens, self._error = [], max_tokens, None
        self._done.clear()
        self._started_s, self._first_token_s = self._read_resources().time_s, {}
        return list(self._tokens)

    def fail(self, request_ids: Sequence[str], error: Exception) -> None:
        """Take the ids of requests that cannot go on, and why."""
        self._error = f"{len(request_ids)} requests: {error}"
        self._done.set()

    def record_step(self, outputs: Sequence[StepOutput]) -> None:
        """Take what one step gave."""
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
        """Wait for the last token; return the run. Raises RuntimeError if it failed."""
        if not self._done.wait(timeout_s):
            raise RuntimeError(f"the run was not over after {timeout_s:g} s")
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
        """Return where every request began to decode, where the first one ended, and the steps."""
        lengths = [(low, high) for _, low, high in self._readings]
        start = next(i for i, (low, _) in enumerate(lengths) if low >= 1) + WARM_UP_STEPS
        stop = next(i for i, (_, high) in enumerate(lengths) if high >= self._max_tokens)
        if stop <= start:
            raise RuntimeError(
                f"max_tokens: got {self._max_tokens}, expected more, so that all decode together"
            )
        return self._readings[start][0], self._readings[stop][0], stop - start


def equal_token_fraction(first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> float:
    """Return the part of all tokens that come before their request's first difference."""
    agreed = sum(
        sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=True)))
        for a, b in zip(first, second, strict=True)
    )
    return agreed / sum(map(len, first))
