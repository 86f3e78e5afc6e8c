"""Options that the benchmarks share: which model, where it lies, where results go."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from benchmarks.evaluation.models import Model, demo_model, random_model
from benchmarks.evaluation.tasks import Sizes
from benchmarks.geometry import Geometry, qwen, small
from benchmarks.sides import ROOT

CACHE = Path.home() / ".cache" / "faasmoe-bench"
DEFAULT_OUT = Path("benchmarks") / "out"
DEMO, QWEN = "demo", "qwen1.5-moe"
QWEN_EXPERTS_PER_FUNCTION = 20  # the paper's
SKEW = 0.5
QUICK_SIZES = Sizes(prompt_characters=24, output_part=0.15)
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
        "--skew", type=float, default=SKEW, help=f"of {QWEN}'s gate, 0 for none (%(default)s)"
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
        "--output-part", type=float, default=1.0, help="of the tasks' full answers, for shorter "
        "runs (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the workload (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny and short: does it all work?")


async def chosen_model(arguments: argparse.Namespace) -> Model:
    """Return the model that the options choose, made if it is not there."""
    model = await _model(arguments)
    changes = {
        name: value
        for name in ("experts_per_function", "functions_per_sandbox")
        if (value := getattr(arguments, name)) is not None
    }
    part = arguments.output_part * model.sizes.output_part
    return replace(model.changed(**changes), sizes=replace(model.sizes, output_part=part))


async def _model(arguments: argparse.Namespace) -> Model:
    cache = arguments.cache.resolve()
    if arguments.quick:
        return await random_model(small(), cache, experts_per_function=3, sizes=QUICK_SIZES)
    if arguments.geometry is not None:
        per_function = -(-arguments.geometry.experts // 3)
        return await random_model(arguments.geometry, cache, experts_per_function=per_function)
    if arguments.model == QWEN:
        geometry = qwen(arguments.layers, skew=arguments.skew)
        return await random_model(geometry, cache, experts_per_function=QWEN_EXPERTS_PER_FUNCTION)
    # In a checkout, where `make demo` has it too.
    folder = ROOT / ".faasmoe" if (ROOT / "pyproject.toml").exists() else cache
    return await demo_model(folder, dtype=arguments.dtype)


def _geometry(text: str) -> Geometry:
    try:
        sizes = [int(part) for part in text.split(",")]
        if len(sizes) != 8 or min(sizes) < 1:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected eight positive numbers with commas between them"
        ) from None
    return Geometry(*sizes)
