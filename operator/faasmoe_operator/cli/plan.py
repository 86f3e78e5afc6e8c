"""`faasmoe plan`: shows the functions and sandboxes of a model and their memory."""

from __future__ import annotations

import argparse
import secrets
from collections import Counter
from typing import Any

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_contracts.store import Manifest
from faasmoe_contracts.store.references import describe_weights
from faasmoe_operator.api.v1alpha1.router import RouterSpec
from faasmoe_operator.cli import model_arguments
from faasmoe_operator.cli.formatting import format_bytes, format_table
from faasmoe_operator.control.local_model import LocalModel
from faasmoe_operator.plan.functions import function_bytes
from faasmoe_operator.plan.router_weights import router_weights_bytes, widest_router_dtype

RUNTIME_BYTES = 160 << 20
"""Memory of the sandbox runtime, counted once: the zygote's PSS with torch 2.13 for CPUs."""
SANDBOX_BYTES = 6 << 20
"""Memory that each generic sandbox adds; buffers of its functions come on top."""


def add_commands(commands: Any) -> None:
    """Add `faasmoe plan`."""
    parser = commands.add_parser(
        "plan",
        help="show what `faasmoe up` would run",
        usage="faasmoe plan (MODEL | -f FILE) [options]",
        description="Show the functions and sandboxes that `faasmoe up` would run and their\n"
        "memory, both when idle and with every function active. Requires a prepared store.",
        epilog="Examples:\n"
        "  faasmoe plan Qwen/Qwen1.5-MoE-A2.7B-Chat --experts-per-function 10\n"
        "  faasmoe plan -f model.yaml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    model_arguments.add_model(parser)
    model_arguments.add_store_options(parser.add_argument_group("weights, as for `faasmoe up`"))
    model_arguments.add_granularity(parser.add_argument_group("functions"))
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan."""
    requested = model_arguments.load_model(arguments)
    manifest = requested.deployment.open_store().manifest
    deployment = requested.laid_out(manifest)
    functions = deployment.functions(manifest, key=secrets.token_bytes(16))
    print(format_plan(deployment, manifest, functions))
    return 0


def format_plan(
    deployment: LocalModel, manifest: Manifest, functions: tuple[FunctionSpec, ...]
) -> str:
    """Return the plan as text: the model, its sandboxes, and its functions grouped by shape.

    Args:
        deployment: the model to serve.
        manifest: manifest of its store.
        functions: the functions that it is split into.
    """
    capacity, pool = deployment.template.capacity, deployment.model.spec.experts.warm_pool
    n_full = -(-len(functions) // capacity)
    layers = len(manifest.layers)
    sizes = {f.id: function_bytes(f, manifest.layers) for f in functions}
    weights = sum(sizes.values())
    model = manifest.model
    head = format_table(
        ("model", deployment.model.metadata.name),
        [
            ("source", model.source),
            ("digest", manifest.digest),
            ("architecture", f"{model.architecture}, {model.dtype}"),
            ("quantization", _describe_quantization(manifest)),
            *(("published", f"{entry} ({entry.where})") for entry in manifest.published),
            ("moe layers", str(len(manifest.layers))),
            ("functions", f"{len(functions)}, {format_bytes(weights)} of weights"),
            *(("weights", line) for line in describe_weights(layers, manifest.checkpoint)),
            ("sandboxes", f"up to {capacity} functions each, {pool} generic kept ready"),
            ("router", _describe_router_weights(deployment.model.spec.router, manifest)),
            ("idle", f"{pool} sandboxes, about {format_bytes(_sandbox_bytes(pool))}"),
            (
                "all active",
                f"{n_full + pool} sandboxes, about "
                f"{format_bytes(weights + _sandbox_bytes(n_full + pool))} including weights",
            ),
        ],
    )
    shapes = Counter((_format_range(f.experts), len(f.layers), sizes[f.id]) for f in functions)
    rows = [
        (experts, str(layers), str(count), format_bytes(size))
        for (experts, layers, size), count in shapes.items()
    ]
    return f"{head}\n\n{format_table(('EXPERTS', 'LAYERS', 'FUNCTIONS', 'WEIGHTS EACH'), rows)}"


def _describe_quantization(manifest: Manifest) -> str:
    """Return what was quantised, or else the codes that experts keep from the checkpoint."""
    entries = [entry for layer in manifest.layers for entry in layer.quantization.values()]
    schemes = ", ".join(sorted({entry.scheme for entry in entries}))
    if manifest.quantization:
        return str(manifest.quantization)
    return f"experts {schemes} as published" if schemes else "none"


def _describe_router_weights(router: RouterSpec, manifest: Manifest) -> str:
    store_dtype = manifest.model.dtype
    stored_bytes = manifest.router_bytes
    dtype = widest_router_dtype(router.dtype, router.device, store_dtype=store_dtype)
    size = format_bytes(
        router_weights_bytes(
            stored_bytes,
            store_dtype=store_dtype,
            dtype=dtype,
            quantized_bytes=manifest.router.quantized_bytes,
        )
    )
    if dtype == store_dtype:
        return f"{size} of weights"
    if router.dtype == "auto":
        return f"up to {size} of weights, {dtype} on a CPU without fast {store_dtype}"
    return f"{size} of weights, {dtype}"


def _sandbox_bytes(n_sandboxes: int) -> int:
    return RUNTIME_BYTES + n_sandboxes * SANDBOX_BYTES


def _format_range(indices: tuple[int, ...]) -> str:
    return f"{indices[0]}-{indices[-1]}" if len(indices) > 1 else str(indices[0])
