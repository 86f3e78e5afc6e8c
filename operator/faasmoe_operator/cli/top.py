"""`faasmoe top`: polls the status of a running model and prints it as a table.

It reads only GET /v1/status of the control API, so it works against any control process. Without
--url it finds the local instances through `runtime_dir`; a model of a cluster is shown as kubectl
sees it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from faasmoe_operator.cli import kubectl_plugin, running_models
from faasmoe_operator.cli.control import fetch_status
from faasmoe_operator.cli.formatting import format_bytes, format_table
from faasmoe_operator.cli.runtime_dir import list_instances
from faasmoe_operator.cli.signals import run_until_signal

FUNCTION_HEADER = (
    "FUNCTION",
    "LAYERS",
    "EXPERTS",
    "STATE",
    "REPLICAS",
    "LOAD",
    "CALLS",
    "ROWS",
    "IDLE",
    "WEIGHTS",
    "MEMORY",
)
TOKEN_VARIABLE = "FAASMOE_TOKEN"
CLEAR = "\x1b[H\x1b[2J"
DEFAULT_LINES = 30


def render_status(status: Mapping[str, Any], *, max_lines: int) -> str:
    """Return totals, then a table of the functions with the most rows first.

    Args:
        status: the response to GET /v1/status.
        max_lines: maximum number of functions.
    """
    functions = sorted(status["functions"], key=lambda f: (-f["rows"], -f["ready"]))
    memory = _memory_by_function(status["sandboxes"])
    rows = [
        _function_row(function, memory.get(function["id"])) for function in functions[:max_lines]
    ]
    n_hidden = len(functions) - len(rows)
    lines = [*_summary_lines(status), "", format_table(FUNCTION_HEADER, rows)]
    return "\n".join(lines + ([f"and {n_hidden} more functions"] if n_hidden else []))


def _summary_lines(status: Mapping[str, Any]) -> list[str]:
    functions, sandboxes, pool = status["functions"], status["sandboxes"], status["pool"]
    weights = sum(f["size_bytes"] for f in functions if f["ready"] > 0)
    memory = sum(sandbox["pss_bytes"] or 0 for sandbox in sandboxes)
    n_shared = sum(sandbox["models"] > 1 for sandbox in sandboxes)
    shared = f"{n_shared} shared with other models; " if n_shared else ""
    reasons = ", ".join(f"{name} {count}" for name, count in sorted(status["decisions"].items()))
    return [
        f"{status['model']}: {len(functions)} functions ({_count_by_state(functions)}), "
        f"{sum(f['ready'] for f in functions)} replicas, {format_bytes(weights)} of active weights",
        f"sandboxes: {len(sandboxes)} ({_count_by_state(sandboxes)}), {format_bytes(memory)}; "
        f"{shared}generic: {pool['ready']}, pool of {pool['size']}",
        f"routers: {status['followers']}; queued calls and requests: {status['held']}; "
        f"decisions: {reasons or 'none'}",
    ]


def _count_by_state(entries: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter(entry["state"] for entry in entries)
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) or "none"


def _memory_by_function(sandboxes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return each function's memory in bytes: its equal share of the PSS of its sandboxes."""
    memory: dict[str, float] = {}
    for sandbox in sandboxes:
        for function in sandbox["functions"]:
            share = (sandbox["pss_bytes"] or 0) / len(sandbox["functions"])
            memory[function] = memory.get(function, 0.0) + share
    return memory


def _function_row(function: Mapping[str, Any], memory_bytes: float | None) -> tuple[str, ...]:
    load, idle_s = function["concurrency"], function["idle_s"]
    layers = function["layers"]
    return (
        function["id"][:12],
        str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}",
        str(function["n_experts"]),
        function["state"],
        f"{function['ready']}/{function['desired']}",
        "-" if load is None else f"{load:.2f}",
        str(function["calls"]),
        str(function["rows"]),
        "-" if idle_s is None else f"{idle_s:.0f} s",
        format_bytes(function["size_bytes"]),
        format_bytes(memory_bytes),
    )


def add_commands(commands: Any) -> None:
    """Add `faasmoe top`."""
    parser = commands.add_parser(
        "top",
        help="show the functions and sandboxes of a running model",
        description="Show state, replicas, load and memory of the functions of a running model.\n"
        "Shows all models that this user's `faasmoe up` serve, or MODEL alone; with -n a\n"
        "MoEModel of a cluster; --url selects another control API.",
        epilog="Examples:\n"
        "  faasmoe top\n"
        "  faasmoe top qwen-moe\n"
        "  faasmoe top qwen-moe -n models      # a MoEModel of the cluster\n"
        "  faasmoe top --once -f model.yaml\n"
        f"  {TOKEN_VARIABLE}=SECRET faasmoe top --url http://127.0.0.1:8080",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    running_models.add_model(parser)
    parser.add_argument(
        "--url", help=f"base URL of a control API; set {TOKEN_VARIABLE} to its token"
    )
    parser.add_argument("--once", action="store_true", help="print once and exit")
    parser.add_argument(
        "--interval",
        type=_interval_seconds,
        default=2.0,
        metavar="S",
        help="seconds between updates (default: %(default)s)",
    )
    parser.add_argument(
        "--lines",
        type=int,
        default=DEFAULT_LINES,
        help="maximum number of functions to show (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the status once, or repeatedly until a signal arrives."""
    cluster = running_models.cluster_of(arguments)
    if cluster is not None:

        async def screen() -> str:
            return await asyncio.to_thread(kubectl_plugin.top, cluster, arguments.model)

    else:
        addresses = _control_addresses(arguments)

        async def screen() -> str:
            statuses = [await fetch_status(url, token=token) for url, token in addresses]
            return "\n\n".join(render_status(s, max_lines=arguments.lines) for s in statuses)

    return asyncio.run(run_until_signal(_refresh_until_cancelled(screen, arguments)))


async def _refresh_until_cancelled(
    screen: Callable[[], Awaitable[str]], arguments: argparse.Namespace
) -> int:
    clear_screen = "" if arguments.once or not sys.stdout.isatty() else CLEAR
    while True:
        print(f"{clear_screen}{await screen()}", flush=True)
        if arguments.once:
            return 0
        await asyncio.sleep(arguments.interval)


def _control_addresses(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Return URL and token of each control API to show."""
    if arguments.url is not None:
        return [(arguments.url.rstrip("/"), os.environ.get(TOKEN_VARIABLE, ""))]
    instances = running_models.select_instances(
        list_instances(), name=arguments.model, file=arguments.file
    )
    return [(instance.control_url, instance.token) for instance in instances]


def _interval_seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 0.1 to 3600 seconds")
    return value
