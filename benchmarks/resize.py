"""What sandboxes' pods request over a bursty day, with a fixed size and resized in place.

`python -m benchmarks.resize` simulates examples/traffic.yaml with the system's own autoscaler,
sandbox plan and resize policy (`benchmarks.simulation`), for several kinds of sandboxes, and writes
`benchmarks/out/resize.json`. Nothing is timed, so it does not depend on the machine. Nodes reserve
the fixed size in both: that more pods would fit with smaller requests is not counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import OUT, write_figures
from benchmarks.simulation.calibration import DEFAULT_FILE, Calibration
from benchmarks.simulation.geometry import load_geometry
from benchmarks.simulation.strategies import Scenario, fleet_model, functions
from benchmarks.simulation.traffic import Traffic, draw_traffic, load_profile

from faasmoe_operator.api.v1alpha1 import MoEModel
from faasmoe_operator.cli.formatting import format_table

PROFILE = Path("examples/traffic.yaml")
GEOMETRY = "qwen3-235b"


@dataclass(frozen=True, slots=True)
class Sandboxes:
    """How a model's sandboxes are made: functions in each, empty ones kept, threads."""

    functions_per_sandbox: int
    warm_pool: int
    threads: int


CASES = (
    Sandboxes(1, 1, 1),  # the defaults
    Sandboxes(1, 32, 1),
    Sandboxes(8, 1, 4),
    Sandboxes(8, 8, 4),
    Sandboxes(64, 2, 8),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resize", description=__doc__)
    parser.add_argument("--profile", type=Path, default=PROFILE, help="default: %(default)s")
    parser.add_argument("--geometry", default=GEOMETRY, help="default: %(default)s")
    parser.add_argument("--requests-per-day", type=int, help="default: those of the profile")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    figures = measure(arguments)
    print(format_cases(figures["cases"]))
    print(write_figures("resize", figures, folder=arguments.out))
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of all cases."""
    profile = load_profile(arguments.profile)
    assert profile.traffic is not None
    spec = profile.traffic
    if arguments.requests_per_day is not None:
        spec = spec.model_copy(update={"requests_per_day": arguments.requests_per_day})
    traffic = draw_traffic(spec, seed=arguments.seed)
    geometry = load_geometry(arguments.geometry, quantization="none")
    costs = Calibration.load(DEFAULT_FILE).scaled(
        speed=profile.cluster.node_speed,
        weights_bytes_per_s=profile.cluster.weights_bytes_per_second,
    )
    scenarios = {
        case: Scenario(_model(case).spec, geometry, costs, profile.cluster) for case in CASES
    }
    return {
        "model": geometry.name,
        "profile": str(arguments.profile),
        "requests": len(traffic.requests),
        "duration_s": traffic.duration_s,
        "seed": arguments.seed,
        "cases": [_measure(case, scenario, traffic) for case, scenario in scenarios.items()],
    }


def _model(case: Sandboxes) -> MoEModel:
    experts = {
        "functionsPerSandbox": case.functions_per_sandbox,
        "warmPool": case.warm_pool,
        "threads": case.threads,
    }
    return MoEModel.model_validate(
        {
            "apiVersion": "faasmoe.dev/v1alpha1",
            "kind": "MoEModel",
            "metadata": {"name": "resized"},
            "spec": {"model": {"source": "file:///simulated"}, "experts": experts},
        }
    )


def _measure(case: Sandboxes, scenario: Scenario, traffic: Traffic) -> dict[str, Any]:
    system = functions(scenario)
    run = system.run(traffic)
    assert system.pool is not None
    fleet = system.pool.fleet
    assert fleet is not None
    full = fleet_model(scenario).resize.full
    sandbox_s = fleet.n_sandboxes.total
    fixed_gb_s, resized_gb_s = (
        sandbox_s * full.memory_bytes / 1e9,
        fleet.requested_bytes.total / 1e9,
    )
    fixed_core_s, resized_core_s = sandbox_s * full.cpu_millis / 1e3, fleet.requested_cores.total
    return {
        "functions_per_sandbox": case.functions_per_sandbox,
        "warm_pool": case.warm_pool,
        "threads": case.threads,
        "served": sum(one.finished_s >= 0 for one in run.requests),
        "mean_sandboxes": sandbox_s / system.loop.now,
        "fixed_gb_seconds": fixed_gb_s,
        "resized_gb_seconds": resized_gb_s,
        "memory_ratio": resized_gb_s / fixed_gb_s,
        "fixed_core_seconds": fixed_core_s,
        "resized_core_seconds": resized_core_s,
        "cpu_ratio": resized_core_s / fixed_core_s,
    }


def format_cases(cases: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with one row for each case."""
    head = ("FUNCTIONS", "WARM", "SANDBOXES", "FIXED GB-S", "RESIZED", "RATIO", "CORE-S RATIO")
    rows = [
        (
            str(case["functions_per_sandbox"]),
            str(case["warm_pool"]),
            f"{case['mean_sandboxes']:.1f}",
            f"{case['fixed_gb_seconds']:,.0f}",
            f"{case['resized_gb_seconds']:,.0f}",
            f"{case['memory_ratio']:.3f}",
            f"{case['cpu_ratio']:.3f}",
        )
        for case in cases
    ]
    return format_table(head, rows)


if __name__ == "__main__":
    sys.exit(main())
