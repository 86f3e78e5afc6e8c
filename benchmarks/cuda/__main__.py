"""Decode speed with the router on a GPU and functions on GPU or CPU, against transformers.

`python -m benchmarks.cuda [--quick] [--device cuda|cpu] [--time-limit 540]`. The model has the
geometry of Qwen1.5-MoE-A2.7B with all 24 layers and random weights (`store`). Systems run one at a
time, each with the whole device, in order of importance. Measurements that do not fit into the time
limit are skipped and listed in the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cuda import tables
from benchmarks.cuda.plan import CudaPlan, Deadline, full_plan, quick_plan
from benchmarks.cuda.runner import (
    IN_PROCESS,
    IN_PROCESS_GRAPHS,
    CudaBenchmark,
    CudaResults,
    ModuleFailed,
    run_module_json,
)
from benchmarks.geometry import FULL_LAYERS, CheckpointGeometry
from benchmarks.report import OUT, describe_machine, write_figures

SHARED_MEMORY = Path("/dev/shm")


def build_figures(
    plan: CudaPlan, results: CudaResults, machine: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of cuda.json."""
    return {
        "machine": machine,
        "device": plan.device,
        "geometry": asdict(plan.geometry),
        "variants": [asdict(variant) for variant in plan.variants],
        "layers_share_their_weights": True,
        "sides": {
            name: {str(batch): tables.describe(runs) for batch, runs in by_batch.items()}
            for name, by_batch in results.runs.items()
        },
        "in_process_implementations": {str(b): n for b, n in results.implementations.items()},
        "throughput_ratio": _throughput_ratios(results),
        "profile_ms": _by_batch(results.profiles),
        "shares": _by_batch(
            {
                name: {batch: tables.step_shares(parts) for batch, parts in by_batch.items()}
                for name, by_batch in results.profiles.items()
            }
        ),
        "transports_us": results.transports,
        "attach": {device: times.to_json() for device, times in results.attach.items()},
        "left_out": results.skipped,
        "failures": results.failures,
    }


def _by_batch(values: Mapping[str, Mapping[int, Any]]) -> dict[str, dict[str, Any]]:
    return {
        name: {str(batch): value for batch, value in by_batch.items()}
        for name, by_batch in values.items()
    }


def _throughput_ratios(results: CudaResults) -> dict[str, dict[str, float]]:
    """Return the throughput of each system relative to the in-process baseline."""
    baseline = results.runs.get(IN_PROCESS, {})
    return {
        name: {
            str(batch): tables.tokens_per_s(runs) / tables.tokens_per_s(baseline[batch])
            for batch, runs in by_batch.items()
            if batch in baseline
        }
        for name, by_batch in results.runs.items()
        if name != IN_PROCESS
    }


async def make_store(geometry: CheckpointGeometry, folder: Path) -> Path:
    """Generate the store in a child process with torch; return its folder."""
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    sizes = json.dumps(asdict(geometry))
    output = await run_module_json("benchmarks.cuda.store", str(folder), sizes)
    return Path(output["store"])


async def run(plan: CudaPlan, *, folder: Path, out: Path) -> int:
    """Run the benchmark, print its tables and write its figures.

    Returns:
        1 if a measurement failed other than that of CUDA graphs, else 0.
    """
    deadline = Deadline(plan.time_limit_s)
    device = await run_module_json("benchmarks.cuda.device", plan.device)
    machine = {**describe_machine(), "device": device}
    started_s = time.monotonic()
    store = await make_store(plan.geometry, folder)
    print(f"generated the model in {time.monotonic() - started_s:.0f} s", flush=True)
    benchmark = CudaBenchmark(plan, store, folder, deadline)
    try:
        await benchmark.measure()
    finally:
        figures_json = build_figures(plan, benchmark.results, machine)
        path = write_figures("cuda", figures_json, folder=out)
    print()
    print(tables.throughput_table(benchmark.results.runs, baseline=IN_PROCESS))
    for name, profiles in benchmark.results.profiles.items():
        print(f"\n{tables.profile_table(name, profiles)}")
    if benchmark.results.transports:
        print(f"\n{tables.transport_table(benchmark.results.transports)}")
    print(f"\nfigures: {path}")
    return 1 if benchmark.results.failures.keys() - {IN_PROCESS_GRAPHS} else 0


def main() -> int:
    """Parse the command line and run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda",
        description="Compare decode speed on a GPU with in-process transformers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="smoke test with a tiny model")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="device of the router"
    )
    parser.add_argument("--layers", type=int, default=FULL_LAYERS, help="MoE layers of the model")
    parser.add_argument("--time-limit", type=float, default=540.0, metavar="S", help="seconds")
    shared = SHARED_MEMORY / f"faasmoe-bench-{os.getuid()}"
    parser.add_argument("--cache", type=Path, default=shared, help="folder of generated models")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of the figures")
    arguments = parser.parse_args()
    limit_s = arguments.time_limit
    if arguments.quick:
        plan = quick_plan(arguments.device, limit_s)
    else:
        plan = full_plan(arguments.device, arguments.layers, limit_s)
    folder, out = arguments.cache.resolve(), arguments.out.resolve()
    try:
        return asyncio.run(run(plan, folder=folder, out=out))
    except ModuleFailed as error:
        return error.status


if __name__ == "__main__":
    sys.exit(main())
