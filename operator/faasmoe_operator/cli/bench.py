"""`faasmoe bench ...`: the benchmarks of `benchmarks/evaluation`, run as a child process.

They are programs that start the data plane and import what this package may not. An installed
distribution has them in `faasmoe_operator/bundled`, so that no package of so common a name lands
among others' packages; a checkout has them at its root.
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
BENCHMARKS = ("paper", "sweep", "report")
PACKAGE = Path(__file__).resolve().parents[1]
ROOTS = (PACKAGE / "bundled", PACKAGE.parents[1])


def add_commands(commands: Any) -> None:
    """Add the subcommand; options are for the benchmarks to read."""
    parser = commands.add_parser(
        "bench",
        help="compare ways to serve a model to several tenants",
        description="Serve the same workload by full models, a local expert server and functions, "
        "and compare speed, processor time and memory.",
    )
    parser.add_argument("benchmark", choices=BENCHMARKS, help="each has a --help of its own")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="of the benchmark")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the benchmarks; return their exit status."""
    root = find_benchmarks_root(ROOTS)
    # Ahead of all else: the child's own children are to find the same benchmarks.
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-m", MODULE, arguments.benchmark, *arguments.options]
    return run_in_foreground(command, environment={"PYTHONPATH": paths})


def find_benchmarks_root(roots: Sequence[Path]) -> Path:
    """Return the folder that holds the benchmarks; raises CommandError if none does."""
    for root in roots:
        if root.joinpath(*MODULE.split("."), "__main__.py").is_file():
            return root
    places = " nor in ".join(map(str, roots))
    raise CommandError(f"benchmarks: neither in {places}; this installation was built without them")
