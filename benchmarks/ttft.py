"""Time to first token through the OpenAI API, after scale to zero and with warm functions."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from benchmarks.report import Spread
from benchmarks.up_process import UpProcess

PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
WARM_REQUESTS = 5
TIMEOUT = aiohttp.ClientTimeout(total=300)


@dataclass(frozen=True, slots=True)
class TTFTMeasurements:
    """Results by round.

    Attributes:
        idle_s: time to first token of the request after idle.
        warm_s: median time to first token of the warm requests that follow.
        cold_start_s: time for which the router queued the request after idle
            (X-FaaSMoE-Cold-Start).
    """

    idle_s: tuple[float, ...]
    warm_s: tuple[float, ...]
    cold_start_s: tuple[float, ...]

    @property
    def ratio(self) -> Spread:
        """Time to first token after idle divided by warm."""
        return Spread.from_values([a / b for a, b in zip(self.idle_s, self.warm_s, strict=True)])

    def to_json(self) -> Mapping[str, Any]:
        """Return the JSON figures."""
        return {
            "ratio": self.ratio,
            "idle_s": Spread.from_values(self.idle_s),
            "warm_s": Spread.from_values(self.warm_s),
            "cold_start_s": Spread.from_values(self.cold_start_s),
            "rounds": len(self.idle_s),
        }


async def measure_ttft(model: UpProcess, *, rounds: int) -> TTFTMeasurements:
    """Measure rounds of one request after idle and WARM_REQUESTS warm ones.

    The first round is a warm-up and discarded.
    """
    results: list[tuple[float, float, float]] = []
    for number in range(rounds + 1):
        await model.wait_idle()
        idle_s, cold_start_s = await _request_ttft(model)
        warm = [(await _request_ttft(model))[0] for _ in range(WARM_REQUESTS)]
        warm_s = statistics.median(warm)
        results.append((idle_s, warm_s, cold_start_s))
        print(f"  round {number} of {rounds}: {idle_s:.3f} s, warm {warm_s:.3f} s", flush=True)
    return TTFTMeasurements(*zip(*results[1:], strict=True))


async def _request_ttft(model: UpProcess) -> tuple[float, float]:
    """Return the time to first token and the cold-start time that the router reports, in s."""
    async with aiohttp.ClientSession(timeout=TIMEOUT) as http:
        started_s = time.perf_counter()
        async with _post_completion(http, model, PROMPT, max_tokens=4) as response:
            response.raise_for_status()
            await response.content.readuntil(b"\n\n")
            first_s = time.perf_counter() - started_s
            await response.read()
            return first_s, float(response.headers.get("X-FaaSMoE-Cold-Start", 0))


async def generate(model: UpProcess, prompts: Sequence[str], *, max_tokens: int) -> None:
    """Generate from all prompts concurrently and wait for all responses."""

    async def complete(http: aiohttp.ClientSession, prompt: str) -> None:
        async with _post_completion(http, model, prompt, max_tokens=max_tokens) as response:
            response.raise_for_status()
            await response.read()

    async with aiohttp.ClientSession(timeout=TIMEOUT) as http:
        await asyncio.gather(*(complete(http, prompt) for prompt in prompts))


def _post_completion(
    http: aiohttp.ClientSession, model: UpProcess, prompt: str, *, max_tokens: int
) -> Any:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": True}
    return http.post(f"{model.url}/v1/completions", json=body | {"model": "bench"})
