"""`faasmoe simulate`: what traffic would cost, simulated with the system's own policies."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.simulation.calibration import DEFAULT_FILE, Calibration
from benchmarks.simulation.errors import SimulationError
from benchmarks.simulation.geometry import (
    BYTES_PER_WEIGHT,
    PUBLISHED,
    ModelGeometry,
    from_store,
    load_geometry,
)
from benchmarks.simulation.outcome import format_outcomes, summarize
from benchmarks.simulation.strategies import STRATEGIES, Scenario
from benchmarks.simulation.traffic import (
    Profile,
    Traffic,
    draw_traffic,
    load_profile,
    read_trace,
)

from faasmoe_contracts.store import StoreError
from faasmoe_operator.api.v1alpha1 import MoEModel, MoEModelError
from faasmoe_operator.control.local_model import LocalModel
from faasmoe_operator.errors import FaasmoeError

PROFILE_SUFFIXES = (".yaml", ".yml")
DEFAULT_MODEL = {
    "apiVersion": "faasmoe.dev/v1alpha1",
    "kind": "MoEModel",
    "metadata": {"name": "simulated"},
    "spec": {"model": {"source": "file:///simulated"}},
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `faasmoe simulate`."""
    parser = argparse.ArgumentParser(
        prog="faasmoe simulate",
        description="Simulate traffic on nodes with the system's own autoscaler, sandbox plan,\n"
        "fair queue and limits, beside whole-model replicas on Knative and always-resident expert\n"
        "parallelism: memory, nodes, cold starts, time to first token, refusals, cost.",
        epilog="TRACE is CSV or JSON lines with TIMESTAMP, ContextTokens, GeneratedTokens (the\n"
        "Azure LLM inference traces') or arrival_s, prompt_tokens, output_tokens; and tenant.\n"
        "PROFILE is a .yaml with traffic, cluster and prices: see docs/planner.md.\n\n"
        "Examples:\n"
        "  faasmoe simulate examples/traffic.yaml --geometry deepseek-v3\n"
        "  faasmoe simulate trace.csv --profile cluster.yaml -f model.yaml --json\n"
        "  faasmoe simulate --calibrate --out calibration.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("traffic", nargs="?", type=Path, metavar="TRACE|PROFILE")
    parser.add_argument("-f", "--file", type=Path, help="MoEModel file: settings, limits, store")
    parser.add_argument(
        "--geometry",
        metavar="NAME|PATH",
        help=f"sizes of the model: {', '.join(PUBLISHED)}, or a config.json; "
        "default: those of the file's store",
    )
    parser.add_argument(
        "--quantization",
        choices=tuple(BYTES_PER_WEIGHT),
        help="scheme of the experts of --geometry; default: the file's, else none",
    )
    parser.add_argument("--profile", type=Path, help="profile with the cluster, beside a TRACE")
    parser.add_argument(
        "--strategy",
        action="append",
        choices=tuple(STRATEGIES),
        help="simulate only this one; may be repeated",
    )
    parser.add_argument(
        "--calibration", type=Path, default=DEFAULT_FILE, help="file that --calibrate wrote"
    )
    parser.add_argument("--tenants", type=int, default=1, help="tenants of a TRACE that names none")
    parser.add_argument("--seed", type=int, default=1, help="seed of drawn traffic (default: 1)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="measure this machine with the demo model, some minutes, and write --out",
    )
    parser.add_argument("--out", type=Path, help="file to write the figures or calibration to")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        if arguments.calibrate:
            return _calibrate(arguments)
        figures = simulate(arguments)
    except (FaasmoeError, StoreError) as error:
        print(f"faasmoe: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, (MoEModelError, SimulationError)) else 1
    text = json.dumps(figures, indent=2)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text if arguments.json else format_figures(figures))
    return 0


def simulate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of each strategy."""
    traffic, profile = _read_traffic(arguments)
    calibration = Calibration.load(arguments.calibration)
    cluster = profile.cluster
    spec, geometry = _read_model(arguments)
    scenario = Scenario(
        spec.spec,
        geometry,
        calibration.scaled(
            speed=cluster.node_speed, weights_bytes_per_s=cluster.weights_bytes_per_second
        ),
        cluster,
    )
    started_s = time.perf_counter()
    outcomes = {}
    for name in arguments.strategy or STRATEGIES:
        run = STRATEGIES[name](scenario).run(traffic, losses=cluster.losses)
        outcomes[name] = summarize(run, profile.prices)
    return {
        "model": geometry.name,
        "weights_gb": geometry.weight_bytes / 1e9,
        "experts_gb": geometry.expert_bytes / 1e9,
        "nodes": cluster.nodes,
        "node_memory_gb": cluster.node_memory_bytes / 1e9,
        "requests": len(traffic.requests),
        "tenants": len({request.tenant for request in traffic.requests}),
        "duration_s": traffic.duration_s,
        "seed": arguments.seed,
        "strategies": outcomes,
        "simulated_in_s": time.perf_counter() - started_s,
    }


def format_figures(figures: dict[str, Any]) -> str:
    """Return the figures as text."""
    head = (
        f"{figures['model']}: {figures['weights_gb']:,.0f} GB of weights, "
        f"{figures['experts_gb']:,.0f} GB of them experts\n"
        f"{figures['requests']:,} requests of {figures['tenants']:,} tenants in "
        f"{figures['duration_s'] / 3600:,.1f} h on {figures['nodes']:,} nodes of "
        f"{figures['node_memory_gb']:,.0f} GB"
    )
    return f"{head}\n\n{format_outcomes(figures['strategies'])}"


def _read_traffic(arguments: argparse.Namespace) -> tuple[Traffic, Profile]:
    if arguments.traffic is None:
        raise SimulationError("TRACE|PROFILE", got=None, expected="a file")
    if arguments.tenants < 1:
        raise SimulationError("--tenants", got=arguments.tenants, expected="1 or more")
    if arguments.traffic.suffix not in PROFILE_SUFFIXES:
        profile = load_profile(arguments.profile) if arguments.profile else Profile()
        trace = read_trace(arguments.traffic, tenants=arguments.tenants, seed=arguments.seed)
        return trace, profile
    profile = load_profile(arguments.traffic)
    if arguments.profile is not None:
        raise SimulationError("--profile", got=str(arguments.profile), expected="a TRACE beside it")
    if profile.traffic is None:
        raise SimulationError(
            "traffic", got=None, expected="requestsPerDay, promptTokens and so on"
        )
    return draw_traffic(profile.traffic, seed=arguments.seed), profile


def _read_model(arguments: argparse.Namespace) -> tuple[MoEModel, ModelGeometry]:
    name, scheme = arguments.geometry, arguments.quantization
    if arguments.file is None:
        if name is None:
            raise SimulationError("--geometry", got=None, expected="a model, or -f FILE")
        return MoEModel.model_validate(DEFAULT_MODEL), load_geometry(
            name, quantization=scheme or "none"
        )
    local = LocalModel.load(arguments.file)
    if name is not None:
        scheme = scheme or local.model.spec.experts.quantization
        return local.model, load_geometry(name, quantization=scheme)
    if scheme is not None:
        raise SimulationError("--quantization", got=scheme, expected="--geometry beside it")
    return local.model, store_geometry(local)


def store_geometry(local: LocalModel) -> ModelGeometry:
    """Return the geometry of a MoEModel's prepared store."""
    store = local.open_store()
    config = json.loads((store.path / "model" / "config.json").read_text(encoding="utf-8"))
    return from_store(store.manifest, config, name=local.model.metadata.name)


def _calibrate(arguments: argparse.Namespace) -> int:
    from benchmarks.simulation.calibrate import calibrate  # starts servers: not for simulating

    path = arguments.out or Path("calibration.json")
    calibration = asyncio.run(calibrate())
    calibration.save(path)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
