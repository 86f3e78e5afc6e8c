"""Measures a machine with the demo model and `faasmoe up`: the figures of a calibration file.

Steps of known rows are timed over HTTP, activations of one, some and all functions over the control
API, memory idle and with all functions attached. The costs are fitted to the times by least squares
of relative errors, none below 0. Everything but the rate at which weights come from storage is
measured with the weights in the page cache.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np
from benchmarks.activation import ROUTER_NAME, watching_routing_table
from benchmarks.report import describe_machine
from benchmarks.resource_usage import MemoryUsage, mapped_bytes
from benchmarks.simulation.calibration import Calibration
from benchmarks.simulation.geometry import ModelGeometry, from_store
from benchmarks.simulation.step_time import distinct_experts
from benchmarks.start import DEMO, prepare_demo
from benchmarks.static_deployment import write_moemodel
from benchmarks.up_process import ZYGOTE, UpProcess, running_up

EXPERTS_PER_FUNCTION = 3  # as in examples/demo.yaml
FUNCTIONS_PER_SANDBOX = 30
WINDOW_S = 6  # Knative's minimum, so that functions scale to zero quickly
MAX_MODEL_LEN = 2048
CALL_SHARE = 0.115
"""Part of a step at batch 1 that calls cost beyond products: decoding takes 1.13 times as long as
with the same engine's experts in process (docs/performance.md)."""

DECODED_TOKENS = 48
BATCHES = (1, 4, 8)
PROMPTS = (16, 128, 256, 448)
ROUNDS = 3
SETTLE_S = 2.0  # sandboxes release a request's memory one second after it
STORAGE_BYTES = 128 << 20
READ_BYTES = 256 << 20  # more than caches hold


@dataclass(frozen=True, slots=True)
class Timing:
    """A measured time: of one step, or of a request of one step, with `rows` rows."""

    rows: int
    seconds: float
    is_request: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """A streamed answer: seconds to its first token, between tokens, and queued at zero."""

    ttft_s: float
    tpot_s: float
    cold_start_s: float
    n_tokens: int


class CompletionClient:
    """Sends completions of exact lengths to a running `faasmoe up`.

    Args:
        model: the running system.
        vocab_size: token ids are drawn below this.
        seed: seed of the prompts.
    """

    def __init__(self, model: UpProcess, *, vocab_size: int, seed: int) -> None:
        self._url = f"{model.url}/v1/completions"
        self._vocab_size = vocab_size
        self._draw = random.Random(f"calibration {seed}")

    async def complete(
        self, http: aiohttp.ClientSession, *, n_prompt: int, n_output: int
    ) -> Answer:
        """Send one request and read its stream to the end."""
        prompt = [self._draw.randrange(100, self._vocab_size) for _ in range(n_prompt)]
        body = {
            "model": "bench",
            "prompt": prompt,
            "max_tokens": n_output,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        started_s, times_s = time.perf_counter(), []
        async with http.post(self._url, json=body) as response:
            response.raise_for_status()
            async for line in response.content:
                if line.startswith(b"data: {") and b'"choices":[]' not in line:
                    times_s.append(time.perf_counter())
            cold_start_s = float(response.headers.get("X-FaaSMoE-Cold-Start", 0))
        tpot_s = (times_s[-1] - times_s[0]) / max(1, n_output - 1)
        return Answer(times_s[0] - started_s, tpot_s, cold_start_s, n_output)


@contextlib.asynccontextmanager
async def running_demo(*, warm_pool: int = 1) -> AsyncIterator[tuple[UpProcess, Path, float]]:
    """Run the demo model with short windows; yield it, its file and the seconds of its start."""
    prepare_demo()
    file = DEMO / "bench-simulate.yaml"
    write_moemodel(
        file,
        checkpoint=DEMO / "demo-model",
        store=DEMO / "demo-store",
        experts_per_function=EXPERTS_PER_FUNCTION,
        max_model_len=MAX_MODEL_LEN,
        experts={
            "functionsPerSandbox": FUNCTIONS_PER_SANDBOX,
            "warmPool": warm_pool,
            "scaling": {
                "windowSeconds": WINDOW_S,
                "panicWindowPercentage": 20,
                "scaleToZeroGracePeriodSeconds": 0,
            },
        },
    )
    started_s = time.perf_counter()
    async with running_up(file) as model:
        yield model, file, time.perf_counter() - started_s


async def calibrate() -> Calibration:
    """Start the demo model, measure it and return the calibration.

    Times are the least of their rounds, so that other work on the machine matters little.
    """
    async with running_demo() as (model, _, start_s):
        return await measure(model, start_s=start_s, typical=min)


async def measure(
    model: UpProcess,
    *,
    start_s: float,
    typical: Callable[[Sequence[float]], float] = statistics.median,
) -> Calibration:
    """Measure a running demo model.

    Args:
        model: the demo model, as `running_demo` runs it.
        start_s: how long its start took.
        typical: makes one time of those of several rounds.
    """
    geometry = demo_geometry(model)
    client = CompletionClient(model, vocab_size=model.store.manifest.model.vocab_size, seed=1)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as http:
        await _warm_up(client, http)
        activations = await _measure_activations(model, typical)
        timings = await _measure_timings(client, http)
        await asyncio.sleep(SETTLE_S)
        await client.complete(http, n_prompt=PROMPTS[0], n_output=4)  # all functions are there
        active = MemoryByKind.of(model)
        await model.wait_idle()
        await asyncio.sleep(SETTLE_S)
        idle = MemoryByKind.of(model)
    fixed_s, byte_s, flop_s, request_s = fit(
        geometry, _typical_timings(timings, typical), memory_bytes_per_s=_memory_rate()
    )
    step_s = typical([t.seconds for t in timings if t.rows == 1 and not t.is_request])
    calls_s = min(fixed_s, CALL_SHARE * step_s)
    sandbox_bytes = (active.sandboxes - idle.sandboxes) / max(
        1, active.n_sandboxes - idle.n_sandboxes
    )
    return Calibration(
        step_s=fixed_s - calls_s,
        call_s=calls_s / len(geometry.layers),
        read_bytes_per_s=1 / byte_s,
        flops_per_s=1 / max(flop_s, 1e-15),
        request_s=request_s,
        control_s=activations.control_s,
        attach_s=activations.attach_s,
        weights_bytes_per_s=_storage_rate(),
        sandbox_start_s=activations.sandbox_start_s,
        router_start_s=start_s,
        system_bytes=max(0.0, float(idle.others)),
        router_bytes=max(0.0, float(idle.router + idle.weights - geometry.router_bytes)),
        runtime_bytes=max(0.0, idle.sandboxes - idle.n_sandboxes * max(0.0, sandbox_bytes)),
        sandbox_bytes=max(0.0, sandbox_bytes),
        attached_factor=max(0.01, (active.weights - idle.weights) / geometry.expert_bytes),
        machine=describe_machine(),
    )


@dataclass(frozen=True, slots=True)
class MemoryByKind:
    """Memory (PSS) in bytes; `weights` are mapped pages of store and checkpoint, of all processes.

    Attributes:
        weights: pages of weights, in no other figure.
        router: the router.
        sandboxes: the sandboxes and the process that they are forked from.
        others: gateway, control process and launcher.
        n_sandboxes: number of sandboxes.
    """

    weights: int
    router: int
    sandboxes: int
    others: int
    n_sandboxes: int

    @classmethod
    def of(cls, model: UpProcess) -> MemoryByKind:
        """Read the memory of all processes."""
        sizes = {"weights": 0, "router": 0, "sandboxes": 0, "others": 0}
        sandboxes = {process.pid for process in model.sandboxes()}
        for process in model.processes():
            command = " ".join(process.cmdline())
            weights = mapped_bytes(process.pid, model.store.path)
            weights += mapped_bytes(process.pid, DEMO / "demo-model")
            kind = "router" if "faasmoe_router" in command else "others"
            if process.pid in sandboxes or ZYGOTE in command:
                kind = "sandboxes"
            sizes["weights"] += weights
            sizes[kind] += MemoryUsage.of_pid(process.pid).total - weights
        return cls(**sizes, n_sandboxes=len(sandboxes))


def demo_geometry(model: UpProcess) -> ModelGeometry:
    """Return the geometry of a running model's store."""
    config = json.loads((model.store.path / "model" / "config.json").read_text(encoding="utf-8"))
    return from_store(model.store.manifest, config, name="demo")


def fit(
    geometry: ModelGeometry, timings: Sequence[Timing], *, memory_bytes_per_s: float = math.inf
) -> tuple[float, float, float, float]:
    """Return (fixed seconds, seconds per byte, per operation, per request) that fit the timings.

    The best of all subsets of the four costs whose least-squares solution is not negative. A byte
    costs at least what reading it from memory does.

    Args:
        geometry: the model that was timed.
        timings: the times.
        memory_bytes_per_s: rate at which this machine reads memory.
    """
    rows = np.array([_costs(geometry, timing) for timing in timings])  # [N, 4]
    measured = np.array([timing.seconds for timing in timings])  # [N]
    relative = rows / measured[:, None]  # [N, 4]
    rest = 1 - relative[:, 1] / memory_bytes_per_s  # [N]
    best, best_error = np.zeros(4), float("inf")
    for size in range(1, 5):
        for chosen in itertools.combinations(range(4), size):
            columns = relative[:, chosen]
            scale = np.abs(columns).max(axis=0)
            scale[scale == 0] = 1.0
            values = np.linalg.lstsq(columns / scale, rest, rcond=None)[0] / scale
            error = float(np.square(columns @ values - rest).sum())
            if (values >= 0).all() and error < best_error:
                best, best_error = np.zeros(4), error
                best[list(chosen)] = values
    fixed_s, byte_s, flop_s, request_s = map(float, best)
    return fixed_s, byte_s + 1 / memory_bytes_per_s, flop_s, request_s


def _costs(geometry: ModelGeometry, timing: Timing) -> tuple[float, float, float, float]:
    """Return what a timing counts once: a step, bytes read, operations, a request."""
    n_bytes, flops = 2.0 * geometry.dense_weights, 2.0 * timing.rows * geometry.dense_weights
    for layer in geometry.layers:
        hit = distinct_experts(layer.num_experts, layer.top_k, timing.rows)
        n_bytes += hit * layer.expert_bytes
        flops += 2.0 * timing.rows * layer.top_k * geometry.expert_weights
    return 1.0, n_bytes, flops, float(timing.is_request)


@dataclass(frozen=True, slots=True)
class Activations:
    """Costs of activations, in the words of `Calibration`."""

    control_s: float
    attach_s: float
    sandbox_start_s: float


async def _measure_activations(
    model: UpProcess, typical: Callable[[Sequence[float]], float]
) -> Activations:
    """Activate one function, one sandbox of them and all of them, each from zero."""
    times_s: dict[int, list[float]] = {}
    async with watching_routing_table(model) as table:
        names = list(table.specs)
        counts = (1, FUNCTIONS_PER_SANDBOX, len(names))
        for _, count in itertools.product(range(ROUNDS), counts):
            await model.wait_idle()
            started_s = time.perf_counter()
            body = {
                "router": ROUTER_NAME,
                "sent_at_s": time.time(),
                "functions": names[:count],
            }
            async with model.http.post(f"{model.control_url}/v1/wake", json=body) as response:
                response.raise_for_status()
            for name in names[:count]:
                await table.wait_for_address(name)
            times_s.setdefault(count, []).append(time.perf_counter() - started_s)
            print(f"  {count} functions activated: {times_s[count][-1]:.3f} s", flush=True)
    one_s, some_s, all_s = (typical(times_s[count]) for count in counts)
    attach_s = max(0.0, (some_s - one_s) / (FUNCTIONS_PER_SANDBOX - 1))
    control_s = max(0.0, one_s - attach_s)
    start_s = all_s - control_s - (len(names) - FUNCTIONS_PER_SANDBOX) * attach_s
    return Activations(control_s, attach_s, max(0.0, start_s))


async def _warm_up(client: CompletionClient, http: aiohttp.ClientSession) -> None:
    for n_prompt in PROMPTS:
        await client.complete(http, n_prompt=n_prompt, n_output=4)


async def _measure_timings(client: CompletionClient, http: aiohttp.ClientSession) -> list[Timing]:
    """Time decoding steps of several batches, and prompts that one step takes."""
    timings: list[Timing] = []
    await client.complete(http, n_prompt=PROMPTS[0], n_output=4)  # all functions are there
    for _ in range(ROUNDS):
        for batch in BATCHES:
            answers = await asyncio.gather(
                *(client.complete(http, n_prompt=4, n_output=DECODED_TOKENS) for _ in range(batch))
            )
            tpot_s = statistics.median(answer.tpot_s for answer in answers)
            timings.append(Timing(batch, tpot_s, is_request=False))
        for n_prompt in PROMPTS:
            answer = await client.complete(http, n_prompt=n_prompt, n_output=1)
            timings.append(Timing(n_prompt, answer.ttft_s, is_request=True))
        print("  " + _describe(timings[-len(BATCHES) - len(PROMPTS) :]), flush=True)
    return timings


def _typical_timings(
    timings: Sequence[Timing], typical: Callable[[Sequence[float]], float]
) -> list[Timing]:
    """Return one timing for each kind."""
    by_kind: dict[tuple[int, bool], list[float]] = {}
    for timing in timings:
        by_kind.setdefault((timing.rows, timing.is_request), []).append(timing.seconds)
    return [Timing(rows, typical(values), kind) for (rows, kind), values in by_kind.items()]


def _describe(timings: Sequence[Timing]) -> str:
    return ", ".join(
        f"{'prompt' if t.is_request else 'batch'} {t.rows}: {t.seconds * 1000:.0f} ms"
        for t in timings
    )


def _storage_rate() -> float:
    """Return the rate at which the demo checkpoint comes from storage, in bytes per second."""
    files = (DEMO / "demo-model").glob("*.safetensors")
    largest = max(files, key=lambda path: path.stat().st_size)
    with largest.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started_s, n_read = time.perf_counter(), 0
        while n_read < STORAGE_BYTES and (block := file.read(4 << 20)):
            n_read += len(block)
        return n_read / (time.perf_counter() - started_s)


def _memory_rate() -> float:
    """Return the highest rate at which one thread reads memory, in bytes per second."""
    array = np.ones(READ_BYTES // 8)
    times_s = []
    for _ in range(2 * ROUNDS):
        started_s = time.perf_counter()
        array.sum()
        times_s.append(time.perf_counter() - started_s)
    return READ_BYTES / min(times_s)
