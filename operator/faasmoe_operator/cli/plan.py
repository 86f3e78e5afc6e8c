"""`faasmoe plan -f FILE`: what would run, and how much memory it would take."""

from __future__ import annotations

import argparse
import secrets
from collections import Counter
from pathlib import Path
from typing import Any

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Manifest
from faasmoe_operator.cli.formatting import format_bytes, format_table
from faasmoe_operator.control.local_model import LocalModel
from faasmoe_operator.plan.functions import function_bytes


def add_commands(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "plan",
        help="show what a MoEModel file would run",
        description="Show the functions and sandboxes that `faasmoe up` would run, "
        "and their memory, idle and with every function up.",
    )
    parser.add_argument("-f", "--file", type=Path, required=True, help="MoEModel file")
    parser.set_defaults(run=run)


RUNTIME_BYTES = 160 << 20
"""The sandboxes' runtime, once: the zygote's proportional share with torch 2.13 for CPUs."""
SANDBOX_BYTES = 6 << 20
"""What each generic sandbox adds; a function's own buffers come on top."""


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    deployment = LocalModel.load(arguments.file)
    manifest = deployment.open_store().manifest
    functions = deployment.functions(manifest, key=secrets.token_bytes(16))
    print(format_plan(deployment, manifest, functions))
    return 0


def format_plan(
    deployment: LocalModel, manifest: Manifest, functions: tuple[FunctionSpec, ...]
) -> str:
    """Return the plan as text: the model, its sandboxes, its functions by shape."""
    capacity, pool = deployment.template.capacity, deployment.model.spec.experts.warm_pool
    n_full = -(-len(functions) // capacity)
    sizes = {f.id: function_bytes(f, manifest.layers) for f in functions}
    weights = sum(sizes.values())
    model = manifest.model
    head = format_table(
        ("model", deployment.model.metadata.name),
        [
            ("source", model.source),
            ("digest", manifest.digest),
            ("architecture", f"{model.architecture}, {model.dtype}"),
            ("moe layers", str(len(manifest.layers))),
            ("functions", f"{len(functions)}, {format_bytes(weights)} of weights"),
            ("sandboxes", f"{capacity} functions in each at most, {pool} generic ones kept ready"),
            ("router", f"{format_bytes(_router_weights_bytes(manifest))} of weights"),
            ("idle", f"{pool} sandboxes, about {format_bytes(_sandbox_bytes(pool))}"),
            (
                "all up",
                f"{n_full + pool} sandboxes, about "
                f"{format_bytes(weights + _sandbox_bytes(n_full + pool))} with weights, once",
            ),
        ],
    )
    shapes = Counter((_format_range(f.experts), len(f.layers), sizes[f.id]) for f in functions)
    rows = [
        (experts, str(layers), str(count), format_bytes(size))
        for (experts, layers, size), count in shapes.items()
    ]
    return f"{head}\n\n{format_table(('EXPERTS', 'LAYERS', 'FUNCTIONS', 'WEIGHTS OF EACH'), rows)}"


def _router_weights_bytes(manifest: Manifest) -> int:
    files = manifest.files.items()
    return sum(file.size_bytes for name, file in files if name.startswith("router/"))


def _sandbox_bytes(n_sandboxes: int) -> int:
    return RUNTIME_BYTES + n_sandboxes * SANDBOX_BYTES


def _format_range(indices: tuple[int, ...]) -> str:
    return f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else str(indices[0])
