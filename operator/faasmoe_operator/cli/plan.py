"""`faasmoe plan -f FILE`: what would run, and how much memory its weights take."""

from __future__ import annotations

import argparse
import secrets
from collections import Counter
from pathlib import Path
from typing import Any

from faasmoe_expert.store import Manifest
from faasmoe_expert.table import FunctionSpec
from faasmoe_operator.cli.deployment import Deployment
from faasmoe_operator.cli.memory import format_bytes
from faasmoe_operator.cli.table import format_table
from faasmoe_operator.plan.functions import function_bytes
from faasmoe_operator.plan.residency import spread


def add_commands(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "plan",
        help="show what a MoEModel file would run",
        description="Show the functions and sandboxes that `faasmoe up` would run.",
    )
    parser.add_argument("-f", "--file", type=Path, required=True, help="MoEModel file")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    deployment = Deployment.load(arguments.file)
    manifest = deployment.open_store().manifest
    functions = deployment.functions(manifest, key=secrets.token_bytes(16))
    print(describe(deployment, manifest, functions))
    return 0


def describe(
    deployment: Deployment, manifest: Manifest, functions: tuple[FunctionSpec, ...]
) -> str:
    """Return the plan as text: the model, its sandboxes, its functions by shape."""
    capacity = deployment.template.capacity
    groups = spread(functions, capacity=capacity)
    sizes = {f.id: function_bytes(f, manifest.layers) for f in functions}
    largest = max(sum(sizes[f.id] for f in group) for group in groups)
    model = manifest.model
    head = format_table(
        ("model", deployment.model.metadata.name),
        [
            ("source", model.source),
            ("digest", manifest.digest),
            ("architecture", f"{model.architecture}, {model.dtype}"),
            ("moe layers", str(len(manifest.layers))),
            ("functions", f"{len(functions)}, {format_bytes(sum(sizes.values()))} of weights"),
            ("sandboxes", f"{len(groups)}, {capacity} functions in each at most"),
            ("largest sandbox", f"{format_bytes(largest)} of weights"),
        ],
    )
    shapes = Counter((_ranges(f.experts), len(f.layers), sizes[f.id]) for f in functions)
    rows = [
        (experts, str(layers), str(count), format_bytes(size))
        for (experts, layers, size), count in shapes.items()
    ]
    return f"{head}\n\n{format_table(('EXPERTS', 'LAYERS', 'FUNCTIONS', 'WEIGHTS OF EACH'), rows)}"


def _ranges(indices: tuple[int, ...]) -> str:
    return f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else str(indices[0])
