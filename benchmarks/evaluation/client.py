"""The client side of every strategy: plays a workload over HTTP and times what is streamed back."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from benchmarks.evaluation.workload import Request, Workload

TIMEOUT = aiohttp.ClientTimeout(total=900)
HELD_HEADER = "X-FaaSMoE-Cold-Start"
DATA, DONE = b"data: ", b"data: [DONE]"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a tenant asks.

    Attributes:
        url: address of the server.
        model: name of the model.
        headers: sent with each request.
    """

    url: str
    model: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request.

    Attributes:
        tenant: who asked.
        number: the request's place among the tenant's.
        text: what was generated.
        n_tokens: tokens of it.
        ttft_s: from sending to the first text.
        total_s: from sending to the end.
        held_s: for how long the router held it, until functions were there.
        error: why it failed; empty if it did not.
    """

    tenant: int
    number: int
    text: str = ""
    n_tokens: int = 0
    ttft_s: float = 0.0
    total_s: float = 0.0
    held_s: float = 0.0
    error: str = ""

    @property
    def tpot_s(self) -> float | None:
        """Time per token after the first; None if there was but one."""
        return (self.total_s - self.ttft_s) / (self.n_tokens - 1) if self.n_tokens > 1 else None


@dataclass(frozen=True, slots=True)
class Played:
    """A workload that was played.

    Attributes:
        answers: to all requests, in the workload's order.
        time_s: from the first request to the last answer, or to the workload's later end.
        busy_s: from the first request to the last answer.
    """

    answers: tuple[Answer, ...]
    time_s: float
    busy_s: float


async def play(
    workload: Workload, endpoints: Sequence[Endpoint], *, progress: Callable[[], object]
) -> Played:
    """Play a workload; a request that fails is told in its answer.

    Args:
        workload: what is asked.
        endpoints: where, for each tenant.
        progress: called after each answer.
    """
    begun_s = time.perf_counter()
    # A connection for each request in flight, kept alive: a pool would queue, and time the queue.
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=TIMEOUT, connector=connector) as http:

        async def ask(request: Request) -> Answer:
            if request.at_s is not None:
                await asyncio.sleep(begun_s + request.at_s - time.perf_counter())
            answer = await _ask(http, endpoints[request.tenant], request)
            progress()
            return answer

        async def ask_in_turn(requests: Sequence[Request]) -> list[Answer]:
            return [await ask(request) for request in requests]

        if workload.is_closed_loop:
            tenants = [workload.of_tenant(tenant) for tenant in range(workload.n_tenants)]
        else:
            tenants = [[request] for request in workload.requests]
        answers = await asyncio.gather(*map(ask_in_turn, tenants))
        busy_s = time.perf_counter() - begun_s
        await asyncio.sleep(max(0.0, workload.duration_s - busy_s))
    return Played(
        tuple(a for given in answers for a in given), time.perf_counter() - begun_s, busy_s
    )


async def _ask(http: aiohttp.ClientSession, endpoint: Endpoint, request: Request) -> Answer:
    reader = _Reader(request)
    url = f"{endpoint.url}/v1/completions"
    body = _body(endpoint, request)
    try:
        async with http.post(url, json=body, headers=endpoint.headers) as response:
            if response.status != 200:
                return reader.failed(f"status {response.status}: {await response.text()}")
            reader.held_s = float(response.headers.get(HELD_HEADER, 0))
            async for line in response.content:
                if line.startswith(DATA) and line.strip() != DONE:
                    reader.take(json.loads(line.removeprefix(DATA)))
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        return reader.failed(f"{type(error).__name__}: {error}")
    return reader.answer()


def _body(endpoint: Endpoint, request: Request) -> Mapping[str, Any]:
    return {
        "model": endpoint.model,
        "prompt": request.task.prompt,
        "max_tokens": request.task.max_tokens,
        "temperature": 0,
        "ignore_eos": True,  # so that every strategy generates as much
        "stream": True,
        "stream_options": {"include_usage": True},
    }


class _Reader:
    """Takes the events of one answer, and the time of each."""

    def __init__(self, request: Request) -> None:
        self.held_s = 0.0
        self._request = request
        self._begun_s = time.perf_counter()
        self._first_s: float | None = None
        self._last_s = 0.0
        self._texts: list[str] = []
        self._n_tokens = 0
        self._error = ""

    def take(self, event: Mapping[str, Any]) -> None:
        """Take an event: a piece of text, the usage, or an error in mid-stream."""
        if "error" in event:
            self._error = str(event["error"].get("message", event["error"]))
            return
        if event.get("usage"):
            self._n_tokens = int(event["usage"]["completion_tokens"])
        for choice in event.get("choices", ()):
            self._last_s = time.perf_counter() - self._begun_s
            if self._first_s is None:
                self._first_s = self._last_s
            self._texts.append(choice["text"])

    def answer(self) -> Answer:
        """Return the answer; a stream that was cut short is a failure."""
        wanted = self._request.task.max_tokens
        if self._error or self._first_s is None or self._n_tokens != wanted:
            return self.failed(self._error or f"got {self._n_tokens} tokens, expected {wanted}")
        return Answer(
            self._request.tenant,
            self._request.number,
            text="".join(self._texts),
            n_tokens=self._n_tokens,
            ttft_s=self._first_s,
            total_s=self._last_s,
            held_s=self.held_s,
        )

    def failed(self, error: str) -> Answer:
        """Return that the request failed."""
        return Answer(self._request.tenant, self._request.number, error=error)
