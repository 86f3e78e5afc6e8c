"""HTTP load client: sends a workload and times the streamed responses."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from benchmarks.evaluation.workload import Workload, WorkloadRequest

TIMEOUT = aiohttp.ClientTimeout(total=900)
COLD_START_HEADER = "X-FaaSMoE-Cold-Start"
DATA, DONE = b"data: ", b"data: [DONE]"


@dataclass(frozen=True, slots=True)
class TenantEndpoint:
    """Endpoint of a tenant.

    Attributes:
        url: base URL of the server.
        model: name of the model.
        headers: headers of each request.
    """

    url: str
    model: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RequestResult:
    """The outcome of a request.

    Attributes:
        tenant: number of the tenant.
        number: index of the request among those of the tenant.
        text: generated text.
        n_tokens: number of generated tokens.
        ttft_s: time from sending to the first text.
        total_s: time from sending to the last text.
        queued_s: time that the router queued it for the activation of functions.
        error: reason for a failure; empty on success.
    """

    tenant: int
    number: int
    text: str = ""
    n_tokens: int = 0
    ttft_s: float = 0.0
    total_s: float = 0.0
    queued_s: float = 0.0
    error: str = ""

    @property
    def tpot_s(self) -> float | None:
        """Time per token after the first; None if there is only one token."""
        return (self.total_s - self.ttft_s) / (self.n_tokens - 1) if self.n_tokens > 1 else None


@dataclass(frozen=True, slots=True)
class WorkloadResult:
    """The outcome of a workload.

    Attributes:
        results: outcome of each request, in the order of the workload.
        time_s: time from the start to the last response or, if later, to the workload's duration.
        busy_s: time from the start to the last response.
    """

    results: tuple[RequestResult, ...]
    time_s: float
    busy_s: float


async def run_workload(
    workload: Workload,
    endpoints: Sequence[TenantEndpoint],
    *,
    progress: Callable[[], object],
    keeps_connections: bool = True,
) -> WorkloadResult:
    """Send all requests of a workload; failures are recorded in the results.

    Args:
        workload: the requests.
        endpoints: endpoint of each tenant.
        progress: called after each response.
        keeps_connections: whether connections are used again; not for servers that may close idle
            ones at any time.
    """
    started_s = time.perf_counter()
    # No connection limit: waiting for a pooled connection would count as latency.
    connector = aiohttp.TCPConnector(limit=0, force_close=not keeps_connections)
    async with aiohttp.ClientSession(timeout=TIMEOUT, connector=connector) as http:

        async def send(request: WorkloadRequest) -> RequestResult:
            if request.at_s is not None:
                await asyncio.sleep(started_s + request.at_s - time.perf_counter())
            result = await _send(http, endpoints[request.tenant], request)
            progress()
            return result

        async def send_in_order(requests: Sequence[WorkloadRequest]) -> list[RequestResult]:
            return [await send(request) for request in requests]

        if workload.is_closed_loop:
            tenants = [workload.of_tenant(tenant) for tenant in range(workload.n_tenants)]
        else:
            tenants = [[request] for request in workload.requests]
        responses = await asyncio.gather(*map(send_in_order, tenants))
        busy_s = time.perf_counter() - started_s
        await asyncio.sleep(max(0.0, workload.duration_s - busy_s))
    results = tuple(result for by_tenant in responses for result in by_tenant)
    return WorkloadResult(results, time.perf_counter() - started_s, busy_s)


async def _send(
    http: aiohttp.ClientSession, endpoint: TenantEndpoint, request: WorkloadRequest
) -> RequestResult:
    reader = _StreamReader(request)
    url = f"{endpoint.url}/v1/completions"
    body = _body(endpoint, request)
    try:
        async with http.post(url, json=body, headers=endpoint.headers) as response:
            if response.status != 200:
                return reader.failed(f"status {response.status}: {await response.text()}")
            reader.queued_s = float(response.headers.get(COLD_START_HEADER, 0))
            async for line in response.content:
                if line.startswith(DATA) and line.strip() != DONE:
                    reader.add_event(json.loads(line.removeprefix(DATA)))
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        return reader.failed(f"{type(error).__name__}: {error}")
    return reader.result()


def _body(endpoint: TenantEndpoint, request: WorkloadRequest) -> Mapping[str, Any]:
    return {
        "model": endpoint.model,
        "prompt": request.task.prompt,
        "max_tokens": request.task.max_tokens,
        "temperature": 0,
        "ignore_eos": True,  # every strategy generates the same number of tokens
        "stream": True,
        "stream_options": {"include_usage": True},
    }


class _StreamReader:
    """Collects the events of one streamed response and their times."""

    def __init__(self, request: WorkloadRequest) -> None:
        self.queued_s = 0.0
        self._request = request
        self._started_s = time.perf_counter()
        self._first_token_s: float | None = None
        self._last_s = 0.0
        self._texts: list[str] = []
        self._n_tokens = 0
        self._error = ""

    def add_event(self, event: Mapping[str, Any]) -> None:
        """Add an event: a text chunk, the usage, or an error in mid-stream."""
        if "error" in event:
            self._error = str(event["error"].get("message", event["error"]))
            return
        if event.get("usage"):
            self._n_tokens = int(event["usage"]["completion_tokens"])
        for choice in event.get("choices", ()):
            self._last_s = time.perf_counter() - self._started_s
            if self._first_token_s is None:
                self._first_token_s = self._last_s
            self._texts.append(choice["text"])

    def result(self) -> RequestResult:
        """Return the outcome; a truncated stream is a failure."""
        expected_tokens = self._request.task.max_tokens
        if self._error or self._first_token_s is None or self._n_tokens != expected_tokens:
            return self.failed(
                self._error or f"got {self._n_tokens} tokens, expected {expected_tokens}"
            )
        return RequestResult(
            self._request.tenant,
            self._request.number,
            text="".join(self._texts),
            n_tokens=self._n_tokens,
            ttft_s=self._first_token_s,
            total_s=self._last_s,
            queued_s=self.queued_s,
        )

    def failed(self, error: str) -> RequestResult:
        """Return a failed outcome."""
        return RequestResult(self._request.tenant, self._request.number, error=error)
