"""Options that the benchmarks share: which model, where it lies, where results go."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from benchmarks.evaluation.models import BenchmarkModel, make_demo_model, make_random_model
from benchmarks.evaluation.tasks import TaskSizes
from benchmarks.geometry import CheckpointGeometry, qwen_geometry, small_geometry
from benchmarks.worker import ROOT

CACHE = Path.home() / ".cache" / "faasmoe-bench"
DEFAULT_OUT = Path("benchmarks") / "out"
DEMO, QWEN = "demo", "qwen1.5-moe"
QWEN_EXPERTS_PER_FUNCTION = 20  # the paper's
DEFAULT_SKEW = 0.5
QUICK_SIZES = TaskSizes(prompt_characters=24, output_fraction=0.15)
QUICK_TENANTS = 2


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the model and where files lie."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", choices=(DEMO, QWEN), default=DEMO, help="demo model, or random weights of a "
        "large model's geometry (%(default)s)",
    )  # fmt: skip
    group.add_argument("--layers", type=int, default=2, help=f"of {QWEN} (%(default)s of 24)")
    group.add_argument(
        "--skew",
        type=float,
        default=DEFAULT_SKEW,
        help=f"of {QWEN}'s gate, 0 for none (%(default)s)",
    )
    group.add_argument(
        "--geometry", type=_geometry, metavar="L,V,H,A,E,K,I,S", help="random weights of another "
        "geometry: layers, vocabulary, hidden size, heads, experts, top-k, sizes of a routed and "
        "of the shared expert",
    )  # fmt: skip
    group.add_argument("--dtype", choices=("bfloat16", "float32"), help=f"of {DEMO}'s weights")
    group.add_argument("--experts-per-function", type=int, help="experts of a layer in a function")
    group.add_argument("--functions-per-sandbox", type=int, help="functions a sandbox may hold")
    group.add_argument("--cache", type=Path, default=CACHE, help="where models lie (%(default)s)")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="results (%(default)s)")
    parser.add_argument(
        "--output-fraction", type=float, default=1.0, help="of the tasks' full answers, for shorter "
        "runs (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the workload (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny and short: does it all work?")


async def make_chosen_model(arguments: argparse.Namespace) -> BenchmarkModel:
    """Return the model that the options choose, made if it is not there."""
    model = await _make_base_model(arguments)
    changes = {
        name: value
        for name in ("experts_per_function", "functions_per_sandbox")
        if (value := getattr(arguments, name)) is not None
    }
    output_fraction = arguments.output_fraction * model.sizes.output_fraction
    return replace(
        model.with_changes(**changes), sizes=replace(model.sizes, output_fraction=output_fraction)
    )


async def _make_base_model(arguments: argparse.Namespace) -> BenchmarkModel:
    cache = arguments.cache.resolve()
    if arguments.quick:
        return await make_random_model(
            small_geometry(), cache, experts_per_function=3, sizes=QUICK_SIZES
        )
    if arguments.geometry is not None:
        per_function = -(-arguments.geometry.experts // 3)
        return await make_random_model(arguments.geometry, cache, experts_per_function=per_function)
    if arguments.model == QWEN:
        geometry = qwen_geometry(arguments.layers, skew=arguments.skew)
        return await make_random_model(
            geometry, cache, experts_per_function=QWEN_EXPERTS_PER_FUNCTION
        )
    # In a checkout, where `make demo` has it too.
    folder = ROOT / ".faasmoe" if (ROOT / "pyproject.toml").exists() else cache
    return await make_demo_model(folder, dtype=arguments.dtype)


def _geometry(text: str) -> CheckpointGeometry:
    try:
        sizes = [int(part) for part in text.split(",")]
        if len(sizes) != 8 or min(sizes) < 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected eight positive numbers with commas between them"
        ) from None
    return CheckpointGeometry(*sizes)
