"""Entry point of `faasmoe bench` and of `python -m benchmarks.evaluation`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from benchmarks.evaluation import day, limited, paper, report, sweep
from benchmarks.peers import command as peers

from faasmoe_contracts.parent_death import PARENT_PID_ENV, die_with_parent


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="faasmoe bench",
        description="Compare strategies for serving a Mixture-of-Experts model to several tenants.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (paper, sweep, peers, day, limited, report):
        module.add_command(commands)
    arguments = parser.parse_args(argv)
    die_with_parent()
    os.environ.pop(PARENT_PID_ENV, None)  # children of this process get its own pid
    status: int = arguments.run(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
