"""Decode speed of FaaSMoE against continuous batching in one transformers process.

`python -m benchmarks.data_plane [--quick] [--layers N] [--profile]`. Both systems have the same
weights, the same KV cache and all cores; neither goes through an HTTP API. The baseline is first
tuned over transformers' experts implementations and OpenMP wait policies, then both decode
alternately. docs/performance.md has the method and the results.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import data_plane_tables as tables
from benchmarks.alternating_runs import (
    PROMPT_TOKENS,
    PairedRuns,
    describe_runs,
    draw_prompts,
    run_alternating,
)
from benchmarks.baseline_tuning import (
    BATCHED_MM,
    DEFAULT_WAIT_POLICY,
    PASSIVE_WAIT_POLICY,
    BestSettings,
    running_baseline,
    running_best_baseline,
)
from benchmarks.geometry import CheckpointGeometry, qwen_geometry, small_geometry
from benchmarks.report import OUT, describe_machine, memory_bytes, write_figures
from benchmarks.resource_usage import MemoryUsage
from benchmarks.static_deployment import (
    StaticDeployment,
    make_model_in_subprocess,
    running_static_deployment,
    write_moemodel,
)
from benchmarks.step_breakdown import breakdown_ms
from benchmarks.worker import ROOT

MAX_MODEL_LEN = 256
N_SYSTEMS = 2
HEADROOM_BYTES = 3 << 30  # caches, runtimes, activations
MAX_GATHERED_FRACTION = 1 / 16  # of all memory, for the weights that batched_mm copies
CACHE = Path.home() / ".cache" / "faasmoe-bench"
N_WARM_UP_RUNS = 2  # 512 prompt tokens each: touches every expert, so that its memory is counted


@dataclass(frozen=True, slots=True)
class DataPlanePlan:
    """The extent of the benchmark.

    Attributes:
        geometry: sizes of the model.
        experts_per_function: experts of one layer per function.
        rounds: runs of each system at each batch size.
        tokens: tokens to generate per request, by batch size.
        trial_tokens: tokens to generate per request in tuning trials.
        wait_policies: OpenMP wait policies to try for the baseline.
    """

    geometry: CheckpointGeometry
    experts_per_function: int
    rounds: int
    tokens: Mapping[int, int]
    trial_tokens: int
    wait_policies: tuple[str, ...]


def full_plan(layers: int, rounds: int) -> DataPlanePlan:
    """Return the plan whose figures are published."""
    tokens = {1: 64, 8: 40, 32: 32}
    return DataPlanePlan(
        qwen_geometry(layers), 20, rounds, tokens, 16, (DEFAULT_WAIT_POLICY, PASSIVE_WAIT_POLICY)
    )


def quick_plan() -> DataPlanePlan:
    """Return a smoke test that takes seconds; its figures are meaningless."""
    return DataPlanePlan(small_geometry(), 3, 2, {1: 8, 8: 8, 32: 8}, 6, (DEFAULT_WAIT_POLICY,))


@dataclass(frozen=True, slots=True)
class DataPlaneResults:
    """Results of the benchmark.

    Attributes:
        runs: paired runs by batch size.
        baseline_settings: settings chosen for the baseline.
        in_process_memory: memory of the baseline.
        memory: memory of each FaaSMoE process, by name.
        floor_bytes: size of all weights, counted once.
        experts_in_memory: fraction of the expert weights that is resident in FaaSMoE processes.
        profile: milliseconds per part of a step, by batch size; empty without --profile.
    """

    runs: Mapping[int, PairedRuns]
    baseline_settings: BestSettings
    in_process_memory: MemoryUsage
    memory: Mapping[str, MemoryUsage]
    floor_bytes: int
    experts_in_memory: float
    profile: Mapping[int, Mapping[str, float]]

    @property
    def memory_over_floor(self) -> float:
        """Memory of all FaaSMoE processes divided by the size of the weights."""
        return MemoryUsage.sum_of(self.memory.values()).total / self.floor_bytes


async def measure(plan: DataPlanePlan, folder: Path, *, profile: bool) -> DataPlaneResults:
    """Build the model, tune the baseline and compare both systems."""
    check_memory(plan.geometry)
    checkpoint, moemodel = await _prepare(plan, folder)
    start = partial(running_baseline, checkpoint, max_model_len=MAX_MODEL_LEN)
    vocabulary = plan.geometry.vocabulary
    prompts = {b: draw_prompts(b, vocabulary=vocabulary, seed=-1) for b in plan.tokens}
    print("tuning the in-process baseline")
    baseline_tuning = running_best_baseline(
        start,
        plan.wait_policies,
        prompts,
        max_tokens=plan.trial_tokens,
        fits=lambda implementation, batch: fits_in_memory(plan.geometry, implementation, batch),
    )
    async with (
        baseline_tuning as (baseline, settings),
        running_static_deployment(moemodel) as deployment,
    ):
        await _warm_up(deployment, vocabulary)
        implementation = settings.implementations[1]
        await baseline.run_batch(prompts[1], max_tokens=4, implementation=implementation)
        print("alternating runs")
        runs = await run_alternating(
            baseline,
            deployment.router,
            implementations=settings.implementations,
            tokens=plan.tokens,
            vocabulary=vocabulary,
            rounds=plan.rounds,
        )
        return DataPlaneResults(
            runs=runs,
            baseline_settings=settings,
            in_process_memory=MemoryUsage.of_pid(baseline.pid),
            memory=deployment.memory_by_process(),
            floor_bytes=deployment.floor_bytes,
            experts_in_memory=deployment.experts_in_memory(),
            profile=await _profile(deployment, plan) if profile else {},
        )


def check_memory(geometry: CheckpointGeometry) -> None:
    """Raise SystemExit if the memory is too small for both systems at once."""
    needed = N_SYSTEMS * geometry.weight_bytes + HEADROOM_BYTES
    available = memory_bytes("MemAvailable")
    if needed > available:
        raise SystemExit(
            f"--layers: got {geometry.layers}, which needs {needed / 1e9:.1f} GB for both systems, "
            f"expected a number that fits into {available / 1e9:.1f} GB of available memory"
        )


def fits_in_memory(geometry: CheckpointGeometry, implementation: str, batch: int) -> bool:
    """Return whether an experts implementation has enough memory to prefill a batch."""
    copied = geometry.gathered_bytes(batch * PROMPT_TOKENS) if implementation == BATCHED_MM else 0
    return copied <= memory_bytes("MemTotal") * MAX_GATHERED_FRACTION


async def _prepare(plan: DataPlanePlan, folder: Path) -> tuple[Path, Path]:
    """Build the model; return its checkpoint and its MoEModel file."""
    checkpoint, store = await make_model_in_subprocess(plan.geometry, folder)
    moemodel = folder / f"{plan.geometry.name}.yaml"
    write_moemodel(
        moemodel,
        checkpoint=checkpoint,
        store=store,
        experts_per_function=plan.experts_per_function,
        max_model_len=MAX_MODEL_LEN,
    )
    return checkpoint, moemodel


async def _warm_up(deployment: StaticDeployment, vocabulary: int) -> None:
    for seed in range(N_WARM_UP_RUNS):
        prompts = draw_prompts(32, vocabulary=vocabulary, seed=-2 - seed)
        await deployment.router.run_batch(prompts, max_tokens=4)


async def _profile(
    deployment: StaticDeployment, plan: DataPlanePlan
) -> dict[int, Mapping[str, float]]:
    profiles: dict[int, Mapping[str, float]] = {}
    for batch, tokens in plan.tokens.items():
        prompts = draw_prompts(batch, vocabulary=plan.geometry.vocabulary, seed=0)
        run = await deployment.router.run_batch(prompts, max_tokens=tokens, profile=True)
        profiles[batch] = breakdown_ms(run)
    return profiles


def build_figures(
    plan: DataPlanePlan, results: DataPlaneResults, machine: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of data_plane.json, except for the fan-out latency."""
    settings = results.baseline_settings
    memory = {name: asdict(usage) for name, usage in results.memory.items()}
    return {
        "machine": machine,
        "geometry": asdict(plan.geometry),
        "experts_per_function": plan.experts_per_function,
        "rounds": plan.rounds,
        "decode_ratio": {str(b): t.decode_ratio.median for b, t in results.runs.items()},
        "cpu_ratio": {str(b): t.cpu_ratio.median for b, t in results.runs.items()},
        "calls_per_token": {str(b): t.calls_per_token for b, t in results.runs.items()},
        "memory_over_floor": results.memory_over_floor,
        "memory": {
            "floor_bytes": results.floor_bytes,
            "experts_in_memory": results.experts_in_memory,
            "in_process": asdict(results.in_process_memory),
            "ours": memory,
        },
        "batches": {
            str(batch): {
                "decode_ratio": runs.decode_ratio,
                "cpu_ratio": runs.cpu_ratio,
                "in_process": describe_runs(runs.in_process)
                | {"implementation": settings.implementations[batch]},
                "ours": describe_runs(runs.ours),
                "equal_tokens": runs.equal_tokens,
                "equal_first_tokens": runs.equal_first_tokens,
                "in_process_own_agreement": settings.self_agreement(batch),
            }
            for batch, runs in results.runs.items()
        },
        "in_process_wait": settings.wait_policy,
        "in_process_trials": [
            {
                "batch": trial.run.batch,
                "wait": trial.wait_policy,
                "implementation": trial.implementation,
                "step_ms": trial.run.step_ms,
                "cpu_ms_per_token": trial.run.cpu_ms_per_token,
            }
            for trial in settings.trials
        ],
        "profile_ms": {str(batch): dict(parts) for batch, parts in results.profile.items()},
    }


async def measure_fanout_p50_us(*, quick: bool) -> float:
    """Return the median fan-out latency in µs, measured while no other process is running."""
    command = [sys.executable, "-m", "benchmarks.fanout", "--product-only"]
    with tempfile.TemporaryDirectory() as folder:
        process = await asyncio.create_subprocess_exec(
            *command, "--out", folder, *(["--quick"] if quick else []), cwd=ROOT
        )
        if await process.wait():
            raise RuntimeError(f"benchmarks.fanout ended with status {process.returncode}")
        written = json.loads((Path(folder) / "fanout.json").read_text(encoding="utf-8"))
    return float(written["fanout_p50_us"])


async def run(plan: DataPlanePlan, *, cache: Path, out: Path, quick: bool, profile: bool) -> None:
    """Run the benchmark, print its tables and write its figures."""
    machine = describe_machine()
    fanout_p50_us = await measure_fanout_p50_us(quick=quick)
    results = await measure(plan, cache, profile=profile)
    print()
    print(tables.decoding_table(results.runs, results.baseline_settings))
    print()
    print(
        tables.memory_table(
            results.memory, results.in_process_memory, floor_bytes=results.floor_bytes
        )
    )
    print(f"resident fraction of the expert weights: {results.experts_in_memory:.1%}")
    if results.profile:
        print()
        print(tables.profile_table(results.profile))
    figures_json = {"fanout_p50_us": fanout_p50_us, **build_figures(plan, results, machine)}
    print(f"\nfigures: {write_figures('data_plane', figures_json, folder=out)}")


def main() -> int:
    """Parse the command line and run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.data_plane",
        description="Compare decode speed with in-process transformers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="smoke test with a tiny model")
    parser.add_argument("--layers", type=int, default=4, help="MoE layers of the model")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each system")
    parser.add_argument("--profile", action="store_true", help="break down the time of a step")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder of generated models")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the figures")
    arguments = parser.parse_args()
    plan = quick_plan() if arguments.quick else full_plan(arguments.layers, arguments.rounds)
    asyncio.run(
        run(
            plan,
            cache=arguments.cache.resolve(),
            out=arguments.out.resolve(),
            quick=arguments.quick,
            profile=arguments.profile,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
