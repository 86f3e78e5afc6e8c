"""Streams completions over HTTP and records when tokens arrive."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from benchmarks.peers.workload import Workload

TIMEOUT = aiohttp.ClientTimeout(total=600)


@dataclass(frozen=True, slots=True)
class StreamedResponse:
    """When a response arrived.

    Attributes:
        ttft_s: time from the request to its first token.
        last_s: time from the request to its last token.
        n_tokens: generated tokens, as the server counts them.
    """

    ttft_s: float
    last_s: float
    n_tokens: int

    @property
    def tpot_s(self) -> float | None:
        """Mean time between tokens; None for a single token."""
        if self.n_tokens < 2:
            return None
        return (self.last_s - self.ttft_s) / (self.n_tokens - 1)


@dataclass(frozen=True, slots=True)
class WorkloadResult:
    """The responses to a workload and the time that all took."""

    responses: tuple[StreamedResponse, ...]
    time_s: float

    @property
    def n_tokens(self) -> int:
        """Generated tokens of all requests."""
        return sum(response.n_tokens for response in self.responses)

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second, prompts included in the time."""
        return self.n_tokens / self.time_s

    @property
    def ttft_ms(self) -> float:
        """Median time to first token."""
        return statistics.median(response.ttft_s for response in self.responses) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """Median over the requests of the time between tokens; None for single tokens."""
        times = [r.tpot_s for r in self.responses if r.tpot_s is not None]
        return statistics.median(times) * 1e3 if times else None


class StreamReader:
    """Evaluates the events of one stream; the caller passes the clock.

    Args:
        started_s: when the request was sent.
    """

    def __init__(self, started_s: float) -> None:
        self._started_s = started_s
        self._first_s: float | None = None
        self._last_s = 0.0
        self._n_tokens: int | None = None

    def read_line(self, line: bytes, now_s: float) -> None:
        """Read a line of the stream.

        A token is an event with a choice that neither ends the response nor is empty, or one that
        ends it with text.
        """
        if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
            return
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            raise RuntimeError(f"the server answered {event['error']}")
        if usage := event.get("usage"):
            self._n_tokens = usage["completion_tokens"]
        for choice in event.get("choices", ()):
            if choice["text"] or choice["finish_reason"] is None:
                self._last_s = now_s
                if self._first_s is None:
                    self._first_s = now_s

    def result(self, expected_tokens: int) -> StreamedResponse:
        """Return the response; raises RuntimeError if it has not the expected length."""
        if self._first_s is None or self._n_tokens != expected_tokens:
            raise RuntimeError(f"response: got {self._n_tokens} tokens, expected {expected_tokens}")
        return StreamedResponse(
            self._first_s - self._started_s, self._last_s - self._started_s, self._n_tokens
        )


def request_body(model: str, prompt: Sequence[int], output_tokens: int) -> dict[str, Any]:
    """Return a greedy request of a fixed length."""
    return {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }


async def run_workload(url: str, model: str, workload: Workload) -> WorkloadResult:
    """Send a workload, `concurrency` requests at a time.

    Raises:
        RuntimeError: a response is no success or not of the requested length.
    """
    in_flight = asyncio.Semaphore(workload.concurrency)
    async with _session() as http:

        async def send(prompt: Sequence[int]) -> StreamedResponse:
            body = request_body(model, prompt, workload.output_tokens)
            async with in_flight:
                return await _stream(http, url, body)

        started_s = time.perf_counter()
        responses = await asyncio.gather(*map(send, workload.prompts))
        return WorkloadResult(tuple(responses), time.perf_counter() - started_s)


async def _stream(
    http: aiohttp.ClientSession, url: str, body: Mapping[str, Any]
) -> StreamedResponse:
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    reader = StreamReader(time.perf_counter())
    async with http.post(f"{url}/v1/completions", json=streamed) as response:
        await _check_status(response)
        async for line in response.content:
            reader.read_line(line, time.perf_counter())
    return reader.result(body["max_tokens"])


async def greedy_tokens(url: str, model: str, workload: Workload) -> tuple[tuple[str, ...], ...]:
    """Return the tokens of each response as text, which tokenizers share but ids need not."""
    async with _session() as http:

        async def send(prompt: Sequence[int]) -> tuple[str, ...]:
            body = request_body(model, prompt, workload.output_tokens) | {"logprobs": 1}
            async with http.post(f"{url}/v1/completions", json=body) as response:
                await _check_status(response)
                return parse_tokens((await response.json())["choices"][0]["logprobs"])

        return tuple(await asyncio.gather(*map(send, workload.prompts)))


def parse_tokens(logprobs: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the tokens of a completion: OpenAI's `tokens`, llama.cpp's `content`."""
    if "tokens" in logprobs:
        return tuple(logprobs["tokens"])
    return tuple(entry["token"] for entry in logprobs["content"])


def _session() -> aiohttp.ClientSession:
    """Return a client with a connection per request, as servers may close idle ones any time."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(timeout=TIMEOUT, connector=connector)


async def _check_status(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        raise RuntimeError(f"the server answered {response.status}: {await response.text()}")
