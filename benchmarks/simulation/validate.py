"""Compares predictions with a real run: `python -m benchmarks.simulation.validate [--minutes N]`.

One `faasmoe up` of the demo model is calibrated, then gets a seeded workload of bursts, with pauses
that are often long enough to scale to zero. The same requests are simulated with the calibration.
Memory, cold starts and times to first token of both are in simulate.json.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
from benchmarks.evaluation.meter import ProcessTree, ResourceUsage, metering
from benchmarks.report import OUT, describe_machine, memory_bytes, percentile, write_figures
from benchmarks.simulation import calibrate
from benchmarks.simulation.calibrate import Answer, CompletionClient
from benchmarks.simulation.calibration import Calibration
from benchmarks.simulation.outcome import summarize
from benchmarks.simulation.strategies import STRATEGIES, Scenario
from benchmarks.simulation.traffic import ClusterSpec, PricesSpec, Traffic, TrafficRequest
from benchmarks.up_process import UpProcess

from faasmoe_operator.cli.formatting import format_table
from faasmoe_operator.control.local_model import LocalModel

PAUSE_S = (4.0, 22.0)  # functions leave after a window of 6 s and the drain
BURST_S = (6.0, 16.0)
REQUESTS_PER_S = 0.6
PROMPT_TOKENS = (24, 400)
OUTPUT_TOKENS = (8, 40)
PAGE_CACHE_BYTES_PER_S = 1e12  # every page is in memory: the calibrated attach has that in it
HEADLINES = ("gb_seconds", "cold_start_p50_s", "ttft_p50_s")
GOAL = 0.15


def bursty_traffic(duration_s: float, *, seed: int) -> Traffic:
    """Return bursts of Poisson arrivals between pauses, of which many reach zero."""
    draw = random.Random(f"validation {seed}")
    requests: list[TrafficRequest] = []
    at_s = draw.uniform(1.0, 3.0)
    while at_s < duration_s:
        end_s = at_s + draw.uniform(*BURST_S)
        while at_s < min(end_s, duration_s):
            n_prompt, n_output = draw.randint(*PROMPT_TOKENS), draw.randint(*OUTPUT_TOKENS)
            requests.append(TrafficRequest(len(requests), at_s, "all", n_prompt, n_output))
            at_s += draw.expovariate(REQUESTS_PER_S)
        at_s = end_s + draw.uniform(*PAUSE_S)
    return Traffic(tuple(requests), duration_s)


@dataclass(frozen=True, slots=True)
class RealRun:
    """Answers in the order of the requests, and the memory of all processes over time."""

    answers: Sequence[Answer]
    usage: ResourceUsage


async def run_real(model: UpProcess, traffic: Traffic, *, seed: int) -> RealRun:
    """Send the traffic at its times."""
    vocab_size = model.store.manifest.model.vocab_size
    client = CompletionClient(model, vocab_size=vocab_size, seed=seed)
    started_s = time.perf_counter()

    async def send(http: aiohttp.ClientSession, request: TrafficRequest) -> Answer:
        await asyncio.sleep(max(0.0, started_s + request.arrival_s - time.perf_counter()))
        return await client.complete(http, n_prompt=request.n_prompt, n_output=request.n_output)

    timeout = aiohttp.ClientTimeout(total=900)
    connector = aiohttp.TCPConnector(limit=0)
    async with (
        aiohttp.ClientSession(timeout=timeout, connector=connector) as http,
        metering(ProcessTree([model.launcher.pid])) as usage,
    ):
        started_s = time.perf_counter()
        answers = asyncio.gather(*(send(http, request) for request in traffic.requests))
        rest_s = asyncio.create_task(asyncio.sleep(traffic.duration_s))
        received = await answers
        await rest_s
    return RealRun(received, usage)


def predict(
    calibration: Calibration, model: UpProcess, file: Path, traffic: Traffic
) -> Mapping[str, Any]:
    """Return what the simulator says of the same traffic."""
    cluster = ClusterSpec.model_validate({"nodes": 1, "nodeMemory": str(memory_bytes("MemTotal"))})
    scenario = Scenario(
        LocalModel.load(file).model.spec,
        calibrate.demo_geometry(model),
        replace(calibration, weights_bytes_per_s=PAGE_CACHE_BYTES_PER_S),
        cluster,
        kv_cache_bytes=0,  # what the router touched of it is in the calibrated router
    )
    run = STRATEGIES["functions"](scenario).run(traffic)
    ttfts = [o.first_token_s - o.request.arrival_s + run.request_s for o in run.requests]
    return summarize(run, PricesSpec()) | {"ttft_mean_s": statistics.mean(ttfts)}


def measured(run: RealRun, duration_s: float) -> dict[str, Any]:
    """Return the figures of a real run, named as the simulator's; memory is scaled to its time."""
    ttfts = [answer.ttft_s for answer in run.answers]
    cold = [answer.cold_start_s for answer in run.answers if answer.cold_start_s > 0]
    samples_gb = [sample.total / 1e9 for sample in run.usage.samples]
    return {
        "served": len(run.answers),
        "gb_seconds": run.usage.byte_s / 1e9 * duration_s / run.usage.samples[-1].at_s,
        "mean_gb": statistics.mean(samples_gb),
        "max_gb": max(samples_gb),
        "cold_starts": len(cold),
        "cold_start_p50_s": percentile(cold, 50) if cold else None,
        "cold_start_p99_s": percentile(cold, 99) if cold else None,
        "ttft_p50_s": percentile(ttfts, 50),
        "ttft_p99_s": percentile(ttfts, 99),
        "ttft_mean_s": statistics.mean(ttfts),
        "tpot_p50_s": percentile([answer.tpot_s for answer in run.answers], 50),
    }


def compare(real: Mapping[str, Any], predicted: Mapping[str, Any]) -> dict[str, float]:
    """Return the relative error of each figure that was measured and predicted."""
    return {
        name: abs(predicted[name] - value) / value
        for name, value in real.items()
        if name != "served" and value and predicted.get(name) is not None
    }


async def validate(minutes: float, *, seed: int) -> dict[str, Any]:
    """Calibrate, run and predict; return the content of simulate.json."""
    machine = describe_machine()
    traffic = bursty_traffic(60 * minutes, seed=seed)
    async with calibrate.running_demo() as (model, file, start_s):
        print("calibration", flush=True)
        calibration = await calibrate.measure(model, start_s=start_s)
        print(f"{len(traffic.requests)} requests in {minutes:g} minutes", flush=True)
        await model.wait_idle()
        run = await run_real(model, traffic, seed=seed)
        predicted = predict(calibration, model, file, traffic)
    real = measured(run, traffic.duration_s)
    errors = compare(real, predicted)
    missing = [name for name in HEADLINES if name not in errors]
    if missing:
        raise RuntimeError(f"nothing to compare for {', '.join(missing)}: a longer run has it")
    return {
        "machine": machine,
        "minutes": minutes,
        "seed": seed,
        "requests": len(traffic.requests),
        "prediction_error": max(errors[name] for name in HEADLINES),
        "goal": GOAL,
        "errors": errors,
        "measured": real,
        "predicted": dict(predicted),
        "calibration": {k: v for k, v in calibration.to_json().items() if k != "machine"},
    }


def format_figures(figures: Mapping[str, Any]) -> str:
    """Return measured and predicted figures side by side."""
    rows = [
        (
            name,
            f"{figures['measured'][name]:.3f}",
            f"{figures['predicted'][name]:.3f}",
            f"{error * 100:.1f} %{' *' if name in HEADLINES else ''}",
        )
        for name, error in figures["errors"].items()
    ]
    table = format_table(("", "MEASURED", "PREDICTED", "ERROR"), rows)
    error = figures["prediction_error"]
    return f"{table}\n\nprediction_error (largest of *): {error:.3f}, goal {figures['goal']}"


def main() -> int:
    """Parse the command line and run the comparison."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.simulation.validate",
        description="Compare simulated with measured memory, cold starts and times to first token.",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="length of the workload")
    parser.add_argument("--seed", type=int, default=1, help="seed of the workload")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of simulate.json")
    arguments = parser.parse_args()
    figures = asyncio.run(validate(arguments.minutes, seed=arguments.seed))
    print(f"\n{format_figures(figures)}")
    print(f"figures: {write_figures('simulate', figures, folder=arguments.out.resolve())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
