"""`faasmoe bench`: the subcommands, and the options that they share.

`python -m benchmarks.evaluation`: the same as `faasmoe bench`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from benchmarks.evaluation import paper, report, sweep

from faasmoe_contracts.parent_death import PARENT_PID_ENV, die_with_parent


def main(argv: Sequence[str] | None = None) -> int:
    """Run a benchmark and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="faasmoe bench",
        description="Compare ways to serve a Mixture-of-Experts model to several tenants.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (paper, sweep, report):
        module.add_command(commands)
    arguments = parser.parse_args(argv)
    die_with_parent()
    os.environ.pop(PARENT_PID_ENV, None)  # our children have another parent
    status: int = arguments.run(arguments)
    return status


sys.exit(main())
