"""Command-line options shared by the benchmarks: model, workload size and output folder."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from benchmarks.evaluation.models import (
    NOT_QUANTIZED,
    ROUTER_SCHEMES,
    BenchmarkModel,
    make_demo_model,
    make_random_model,
    quantized,
)
from benchmarks.evaluation.tasks import TaskSizes
from benchmarks.geometry import CheckpointGeometry, qwen_geometry, small_geometry
from benchmarks.worker import ROOT

CACHE = Path.home() / ".cache" / "faasmoe-bench"
DEFAULT_OUT = Path("benchmarks") / "out"
DEMO, QWEN = "demo", "qwen1.5-moe"
QWEN_EXPERTS_PER_FUNCTION = 20  # as in the paper
DEFAULT_SKEW = 0.5
QUICK_SIZES = TaskSizes(prompt_characters=24, output_fraction=0.15)
QUICK_TENANTS = 2


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the shared options."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        choices=(DEMO, QWEN),
        default=DEMO,
        help="the demo model, or random weights with the geometry of a large model "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--layers", type=int, default=2, help=f"layers of {QWEN}, up to 24 (default: %(default)s)"
    )
    group.add_argument(
        "--skew",
        type=float,
        default=DEFAULT_SKEW,
        help=f"skew of the gate of {QWEN}, 0 for none (default: %(default)s)",
    )
    group.add_argument(
        "--geometry",
        type=_geometry,
        metavar="L,V,H,A,E,K,I,S",
        help="random weights with another geometry: layers, vocabulary, hidden size, heads, "
        "experts, top-k, intermediate sizes of a routed and of the shared expert",
    )
    group.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help=f"dtype of the weights of {DEMO}"
    )
    group.add_argument(
        "--quantization",
        choices=tuple(ROUTER_SCHEMES),
        default=NOT_QUANTIZED,
        help="scheme of the store's weights; full models keep those of the checkpoint "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--experts-per-function", type=int, metavar="N", help="experts of one layer per function"
    )
    group.add_argument(
        "--functions-per-sandbox", type=int, metavar="N", help="maximum functions per sandbox"
    )
    group.add_argument(
        "--cache",
        type=Path,
        default=CACHE,
        help="folder of generated models (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help="folder of results (default: %(default)s)"
    )
    parser.add_argument(
        "--output-fraction",
        type=float,
        default=1.0,
        metavar="F",
        help="fraction of each task's full output length to generate (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the workload (default: %(default)s)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="smoke test with a tiny model and a short workload"
    )


async def make_chosen_model(arguments: argparse.Namespace) -> BenchmarkModel:
    """Return the model that the options select; generate it unless it exists."""
    model = await quantized(await _make_base_model(arguments), arguments.quantization)
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
    # A checkout shares the model with `make demo`.
    folder = ROOT / ".faasmoe" if (ROOT / "pyproject.toml").exists() else cache
    return await make_demo_model(folder, dtype=arguments.dtype)


def _geometry(text: str) -> CheckpointGeometry:
    try:
        sizes = [int(part) for part in text.split(",")]
        if len(sizes) != 8 or min(sizes) < 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected eight comma-separated positive integers"
        ) from None
    return CheckpointGeometry(*sizes)  # type: ignore[arg-type]  # the eight sizes come first
