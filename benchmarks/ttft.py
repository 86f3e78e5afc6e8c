"""Time to the first token through the real API: after everything went to zero, and warm."""

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
    """What several rounds gave.

    Attributes:
        idle_s: time to the first token after idle, a round each.
        warm_s: median of the warm requests that followed at once, a round each.
        held_s: what the router said that a cold request was held, a round each.
    """

    idle_s: tuple[float, ...]
    warm_s: tuple[float, ...]
    held_s: tuple[float, ...]

    @property
    def ratio(self) -> Spread:
        """After idle over warm, by round."""
        return Spread.from_values([a / b for a, b in zip(self.idle_s, self.warm_s, strict=True)])

    def to_json(self) -> Mapping[str, Any]:
        """Return the figures."""
        return {
            "ratio": self.ratio,
            "idle_s": Spread.from_values(self.idle_s),
            "warm_s": Spread.from_values(self.warm_s),
            "held_s": Spread.from_values(self.held_s),
            "rounds": len(self.idle_s),
        }


async def measure_ttft(model: UpProcess, *, rounds: int) -> TTFTMeasurements:
    """Measure rounds of one request after idle and some warm ones; the first round is dropped."""
    found: list[tuple[float, float, float]] = []
    for number in range(rounds + 1):
        await model.wait_idle()
        idle_s, queued_s = await _request_ttft(model)
        warm = [(await _request_ttft(model))[0] for _ in range(WARM_REQUESTS)]
        found.append((idle_s, statistics.median(warm), queued_s))
        print(
            f"  round {number} of {rounds}: {idle_s:.3f} s, warm {found[-1][1]:.3f} s", flush=True
        )
    idle, warm_s, queued = zip(*found[1:], strict=True)
    return TTFTMeasurements(idle, warm_s, queued)


async def _request_ttft(model: UpProcess) -> tuple[float, float]:
    """Return the time to the first token, and for how long the request was held."""
    async with aiohttp.ClientSession(timeout=TIMEOUT) as http:
        started_s = time.perf_counter()
        async with _post_completion(http, model, PROMPT, max_tokens=4) as response:
            response.raise_for_status()
            await response.content.readuntil(b"\n\n")
            first_s = time.perf_counter() - started_s
            await response.read()
            return first_s, float(response.headers.get("X-FaaSMoE-Cold-Start", 0))


async def generate(model: UpProcess, prompts: Sequence[str], *, max_tokens: int) -> None:
    """Let the model answer prompts at once, to the end."""

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
