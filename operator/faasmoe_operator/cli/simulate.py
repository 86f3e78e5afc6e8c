"""`faasmoe simulate`: runs `benchmarks.simulation` as a child process.

The simulator imports the router's policies, which this package must not do; see `bench`.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from faasmoe_operator.cli.bench import ROOTS, find_benchmarks_root
from faasmoe_operator.cli.checkpoint import run_in_foreground

MODULE = "benchmarks.simulation"


def add_commands(commands: Any) -> None:
    """Add `faasmoe simulate`; the simulator itself parses all options, --help included."""
    parser = commands.add_parser(
        "simulate",
        help="simulate what traffic would cost, beside whole-model replicas",
        add_help=False,
        prefix_chars="\0",  # so that options reach the simulator, wherever they are
    )
    parser.add_argument("options", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the simulator and return its exit status."""
    root = find_benchmarks_root(ROOTS)
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-m", MODULE, *arguments.options]
    return run_in_foreground(command, environment={"PYTHONPATH": paths})
