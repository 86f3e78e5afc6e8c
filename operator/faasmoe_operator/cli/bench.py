"""`faasmoe bench`: runs `benchmarks.evaluation` as a child process.

The benchmarks import the router and torch, which this package must not do. A checkout has them at
its root. A wheel ships them in `faasmoe_operator/bundled`, because a top-level package named
`benchmarks` would clash with other distributions in site-packages.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from faasmoe_operator.cli.checkpoint import run_in_foreground
from faasmoe_operator.errors import CommandError

MODULE = "benchmarks.evaluation"
BENCHMARKS = ("paper", "sweep", "peers", "day", "limited", "report")
PACKAGE = Path(__file__).resolve().parents[1]
ROOTS = (PACKAGE / "bundled", PACKAGE.parents[1])


def add_commands(commands: Any) -> None:
    """Add `faasmoe bench`; the benchmark itself parses the remaining options."""
    parser = commands.add_parser(
        "bench",
        help="compare strategies for serving a model to several tenants",
        description="Run the same workload against full models, a local expert server and expert\n"
        "functions, and compare latency, throughput, CPU time and memory.",
        epilog="Examples:\n"
        "  faasmoe bench paper --help\n"
        "  faasmoe bench paper --repeats 2 --time-limit 300\n"
        "  faasmoe bench report",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("benchmark", choices=BENCHMARKS, help="benchmark to run")
    parser.add_argument(
        "options",
        nargs=argparse.REMAINDER,
        help="options of the benchmark (see faasmoe bench BENCHMARK --help)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmark and return its exit status."""
    root = find_benchmarks_root(ROOTS)
    # First on the path, so that processes started by the benchmark import the same modules.
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-m", MODULE, arguments.benchmark, *arguments.options]
    return run_in_foreground(command, environment={"PYTHONPATH": paths})


def find_benchmarks_root(roots: Sequence[Path]) -> Path:
    """Return the first root that contains the benchmarks.

    Raises:
        CommandError: none of them does.
    """
    for root in roots:
        if root.joinpath(*MODULE.split("."), "__main__.py").is_file():
            return root
    searched = ", ".join(map(str, roots))
    raise CommandError(
        f"benchmarks: not found in {searched}; this installation was built without them"
    )
