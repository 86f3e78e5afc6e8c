"""In-process transformers continuous batching against ours, side by side in one run.

`python -m benchmarks.data_plane [--quick] [--layers N] [--profile]`. Both sides have the same
weights, the same cache and every core; neither has an HTTP API in the way. Each gets the settings
that are best for it: the in-process side is first tried with each of transformers' experts
implementations and with both ways for threads to wait. Then both decode in turn. What is measured,
and what it was, stands in docs/performance.md.
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
SIDES = 2
HEADROOM_BYTES = 3 << 30  # caches, runtimes, activations
MAX_GATHERED_FRACTION = 1 / 16  # of memory, for the copies that batched_mm makes
CACHE = Path.home() / ".cache" / "faasmoe-bench"
N_WARM_UP_RUNS = 2  # of 512 prompt tokens each: every expert is touched, so that its memory counts


@dataclass(frozen=True, slots=True)
class DataPlanePlan:
    """How much is measured.

    Attributes:
        geometry: sizes of the model.
        experts_per_function: experts of a layer in one function.
        rounds: turns of each side at each batch size.
        tokens: tokens that each request generates in a turn, by batch size.
        trial_tokens: the same when the in-process side's settings are tried.
        waits: how the in-process side's threads may wait.
    """

    geometry: CheckpointGeometry
    experts_per_function: int
    rounds: int
    tokens: Mapping[int, int]
    trial_tokens: int
    waits: tuple[str, ...]


def full_plan(layers: int, rounds: int) -> DataPlanePlan:
    """Return the plan whose figures count."""
    tokens = {1: 64, 8: 40, 32: 32}
    return DataPlanePlan(
        qwen_geometry(layers), 20, rounds, tokens, 16, (DEFAULT_WAIT_POLICY, PASSIVE_WAIT_POLICY)
    )


def quick_plan() -> DataPlanePlan:
    """Return a plan of seconds, which shows that everything works; its figures mean nothing."""
    return DataPlanePlan(small_geometry(), 3, 2, {1: 8, 8: 8, 32: 8}, 6, (DEFAULT_WAIT_POLICY,))


@dataclass(frozen=True, slots=True)
class DataPlaneResults:
    """What a run of the benchmark found.

    Attributes:
        turns: both sides' runs by batch size.
        choice: the in-process side's settings.
        in_process_memory: of the in-process side.
        memory: of each of our processes.
        floor_bytes: bytes of all weights, once.
        experts_in_memory: the part of the experts' weights that our memory holds.
        profile: where our step's time went, by batch size, if that was asked for.
    """

    turns: Mapping[int, PairedRuns]
    choice: BestSettings
    in_process_memory: MemoryUsage
    memory: Mapping[str, MemoryUsage]
    floor_bytes: int
    experts_in_memory: float
    profile: Mapping[int, Mapping[str, float]]

    @property
    def memory_over_floor(self) -> float:
        """Memory of all our processes over the weights once."""
        return MemoryUsage.sum_of(self.memory.values()).total / self.floor_bytes


async def measure(plan: DataPlanePlan, folder: Path, *, profile: bool) -> DataPlaneResults:
    """Make the model, try the settings, compare."""
    check_memory(plan.geometry)
    checkpoint, moemodel = await _prepare(plan, folder)
    start = partial(running_baseline, checkpoint, max_model_len=MAX_MODEL_LEN)
    vocabulary = plan.geometry.vocabulary
    prompts = {b: draw_prompts(b, vocabulary=vocabulary, seed=-1) for b in plan.tokens}
    print("settings of the in-process side")
    baseline_tuning = running_best_baseline(
        start,
        plan.waits,
        prompts,
        max_tokens=plan.trial_tokens,
        fits=lambda implementation, batch: fits_in_memory(plan.geometry, implementation, batch),
    )
    async with baseline_tuning as (baseline, choice), running_static_deployment(moemodel) as fleet:
        await _warm_up(fleet, vocabulary)
        await baseline.run_batch(prompts[1], max_tokens=4, implementation=choice.implementations[1])
        print("turns")
        turns = await run_alternating(
            baseline,
            fleet.router,
            implementations=choice.implementations,
            tokens=plan.tokens,
            vocabulary=vocabulary,
            rounds=plan.rounds,
        )
        return DataPlaneResults(
            turns=turns,
            choice=choice,
            in_process_memory=MemoryUsage.of_pid(baseline.pid),
            memory=fleet.memory_by_process(),
            floor_bytes=fleet.floor_bytes,
            experts_in_memory=fleet.experts_in_memory(),
            profile=await _profile(fleet, plan) if profile else {},
        )


def check_memory(geometry: CheckpointGeometry) -> None:
    """Raise SystemExit if both sides at once do not fit into memory."""
    needed = SIDES * geometry.weight_bytes + HEADROOM_BYTES
    available = memory_bytes("MemAvailable")
    if needed > available:
        raise SystemExit(
            f"--layers: got {geometry.layers}, which takes {needed / 1e9:.1f} GB for both sides, "
            f"expected what fits into the {available / 1e9:.1f} GB that are available"
        )


def fits_in_memory(geometry: CheckpointGeometry, implementation: str, batch: int) -> bool:
    """Tell whether an experts implementation has the memory for the prefill of a batch."""
    copied = geometry.gathered_bytes(batch * PROMPT_TOKENS) if implementation == BATCHED_MM else 0
    return copied <= memory_bytes("MemTotal") * MAX_GATHERED_FRACTION


async def _prepare(plan: DataPlanePlan, folder: Path) -> tuple[Path, Path]:
    """Return checkpoint and MoEModel file."""
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


async def _warm_up(fleet: StaticDeployment, vocabulary: int) -> None:
    for seed in range(N_WARM_UP_RUNS):
        prompts = draw_prompts(32, vocabulary=vocabulary, seed=-2 - seed)
        await fleet.router.run_batch(prompts, max_tokens=4)


async def _profile(fleet: StaticDeployment, plan: DataPlanePlan) -> dict[int, Mapping[str, float]]:
    profiles: dict[int, Mapping[str, float]] = {}
    for batch, tokens in plan.tokens.items():
        prompts = draw_prompts(batch, vocabulary=plan.geometry.vocabulary, seed=0)
        run = await fleet.router.run_batch(prompts, max_tokens=tokens, profile=True)
        profiles[batch] = breakdown_ms(run)
    return profiles


def build_figures(
    plan: DataPlanePlan, results: DataPlaneResults, machine: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what is written to data_plane.json, without the fan-out."""
    memory = {name: asdict(memory) for name, memory in results.memory.items()}
    return {
        "machine": machine,
        "geometry": asdict(plan.geometry),
        "experts_per_function": plan.experts_per_function,
        "rounds": plan.rounds,
        "decode_ratio": {str(b): t.decode_ratio.median for b, t in results.turns.items()},
        "cpu_ratio": {str(b): t.cpu_ratio.median for b, t in results.turns.items()},
        "calls_per_token": {str(b): t.calls_per_token for b, t in results.turns.items()},
        "memory_over_floor": results.memory_over_floor,
        "memory": {
            "floor_bytes": results.floor_bytes,
            "experts_in_memory": results.experts_in_memory,
            "in_process": asdict(results.in_process_memory),
            "ours": memory,
        },
        "batches": {
            str(batch): {
                "decode_ratio": turns.decode_ratio,
                "cpu_ratio": turns.cpu_ratio,
                "in_process": describe_runs(turns.in_process)
                | {"implementation": results.choice.implementations[batch]},
                "ours": describe_runs(turns.ours),
                "equal_tokens": turns.equal_tokens,
                "equal_first_tokens": turns.equal_first_tokens,
                "in_process_own_agreement": results.choice.self_agreement(batch),
            }
            for batch, turns in results.turns.items()
        },
        "in_process_wait": results.choice.wait_policy,
        "in_process_trials": [
            {
                "batch": trial.run.batch,
                "wait": trial.wait_policy,
                "implementation": trial.implementation,
                "step_ms": trial.run.step_ms,
                "cpu_ms_per_token": trial.run.cpu_ms_per_token,
            }
            for trial in results.choice.trials
        ],
        "profile_ms": {str(batch): dict(parts) for batch, parts in results.profile.items()},
    }


async def measure_fanout_p50_us(*, quick: bool) -> float:
    """Return the median round trip of the hot path in µs, measured before all else is started."""
    command = [sys.executable, "-m", "benchmarks.fanout", "--product-only"]
    with tempfile.TemporaryDirectory() as folder:
        process = await asyncio.create_subprocess_exec(
            *command, "--out", folder, *(["--quick"] if quick else []), cwd=ROOT
        )
        if await process.wait():
            raise RuntimeError(f"the fan-out could not be measured: status {process.returncode}")
        written = json.loads((Path(folder) / "fanout.json").read_text(encoding="utf-8"))
    return float(written["fanout_p50_us"])


async def run(plan: DataPlanePlan, *, cache: Path, out: Path, quick: bool, profile: bool) -> None:
    """Measure, print the tables, write the figures."""
    machine = describe_machine()
    fanout_p50_us = await measure_fanout_p50_us(quick=quick)
    results = await measure(plan, cache, profile=profile)
    print()
    print(tables.decoding_table(results.turns, results.choice))
    print()
    print(
        tables.memory_table(
            results.memory, results.in_process_memory, floor_bytes=results.floor_bytes
        )
    )
    print(f"part of the experts' weights that was touched: {results.experts_in_memory:.1%}")
    if results.profile:
        print()
        print(tables.profile_table(results.profile))
    figures_json = {"fanout_p50_us": fanout_p50_us, **build_figures(plan, results, machine)}
    print(f"\nfigures: {write_figures('data_plane', figures_json, folder=out)}")


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_plane")
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it all work?")
    parser.add_argument("--layers", type=int, default=4, help="MoE layers (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (%(default)s)")
    parser.add_argument("--profile", action="store_true", help="where our step's time goes")
    parser.add_argument("--cache", type=Path, default=CACHE, help="models (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="figures (%(default)s)")
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
