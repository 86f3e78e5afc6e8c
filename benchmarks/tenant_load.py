"""Closed-loop load of several tenants: each keeps a number of requests outstanding."""

from __future__ import annotations

import asyncio
import random
import string
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import aiohttp
from benchmarks.tenant_router import MODEL, api_key

PROMPT_TOKEN_PRICE = 1.0  # the same prices as the router's fair queue
GENERATED_TOKEN_PRICE = 2.0
POLL_S = 0.05
TIMEOUT = aiohttp.ClientTimeout(total=600)


@dataclass(frozen=True, slots=True)
class TenantTraffic:
    """The load of one tenant.

    Attributes:
        name: name of the tenant.
        outstanding: number of outstanding requests.
        pause_s: mean of the exponentially distributed pause between response and next request.
        output_tokens: minimum and maximum length of a response.
        key: API key; empty for the tenant's own.
    """

    name: str
    outstanding: int
    pause_s: float = 0.0
    output_tokens: tuple[int, int] = (24, 40)
    key: str = ""


@dataclass(slots=True)
class TenantResult:
    """The responses to one tenant.

    Attributes:
        latencies_s: time from each request to the end of its response.
        cost: token cost of all responses.
        rejected: number of requests with a status other than 200.
    """

    latencies_s: list[float] = field(default_factory=list)
    cost: float = 0.0
    rejected: int = 0


@dataclass(frozen=True, slots=True)
class LoadPattern:
    """The load of all tenants and its duration.

    Attributes:
        callers: load of each tenant.
        measured_tenants: tenants whose responses are counted.
        answers: number of counted responses after which the load ends.
    """

    callers: Sequence[TenantTraffic]
    measured_tenants: Sequence[str]
    answers: int


async def run_load(url: str, load: LoadPattern, *, seed: int) -> dict[str, TenantResult]:
    """Apply a load; requests outstanding at its end are cancelled and not counted.

    Returns:
        The results by tenant.
    """
    results = {caller.name: TenantResult() for caller in load.callers}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=TIMEOUT, connector=connector) as http:
        tasks = [
            asyncio.create_task(
                _request_repeatedly(
                    http, url, caller, results[caller.name], f"{seed}/{caller.name}/{i}"
                )
            )
            for caller in load.callers
            for i in range(caller.outstanding)
        ]
        while sum(len(results[name].latencies_s) for name in load.measured_tenants) < load.answers:
            done, _ = await asyncio.wait(tasks, timeout=POLL_S, return_when="FIRST_COMPLETED")
            for task in done:
                task.result()  # only an exception ends a task
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return results


async def _request_repeatedly(
    http: aiohttp.ClientSession, url: str, traffic: TenantTraffic, result: TenantResult, seed: str
) -> None:
    draw = random.Random(seed)
    headers = {"Authorization": f"Bearer {traffic.key or api_key(traffic.name)}"}
    await asyncio.sleep(draw.uniform(0, 0.5))
    while True:
        body = _request_body(draw, traffic)
        started_s = time.perf_counter()
        async with http.post(f"{url}/v1/completions", json=body, headers=headers) as response:
            payload = await response.json()
        if response.status == 200:
            result.latencies_s.append(time.perf_counter() - started_s)
            result.cost += _token_cost(payload["usage"])
        else:
            result.rejected += 1
        if traffic.pause_s:
            await asyncio.sleep(draw.expovariate(1 / traffic.pause_s))


def _request_body(draw: random.Random, traffic: TenantTraffic) -> dict[str, object]:
    prompt = "".join(draw.choices(string.ascii_letters + string.digits, k=draw.randint(16, 48)))
    return {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": draw.randint(*traffic.output_tokens),
        "temperature": 0,
        "ignore_eos": True,
    }


def _token_cost(usage: Mapping[str, int]) -> float:
    generated = usage["completion_tokens"] * GENERATED_TOKEN_PRICE
    return usage["prompt_tokens"] * PROMPT_TOKEN_PRICE + generated


def jain_index(values: Sequence[float]) -> float:
    """Return Jain's fairness index: 1 if all values are equal, 1/n if all but one are 0."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 0.0
