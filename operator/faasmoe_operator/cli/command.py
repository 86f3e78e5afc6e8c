"""The `faasmoe` command: its subcommands, and what becomes of their errors.

Exit statuses: 0 done, 1 failed, 2 a wrong argument or MoEModel file, 128 + N ended by signal N.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from faasmoe_contracts.store import StoreError
from faasmoe_operator.api.v1alpha1 import MoEModelError
from faasmoe_operator.cli import bench, checkpoint, crd, plan, top, up, version
from faasmoe_operator.errors import CommandError, FaasmoeError

EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="faasmoe: %(levelname)s %(message)s")
    try:
        exit_status: int = arguments.run(arguments)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except (FaasmoeError, StoreError) as error:
        print(f"faasmoe: error: {error}", file=sys.stderr)
        return _exit_status(error)
    return exit_status


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="faasmoe",
        description="Serve Mixture-of-Experts language models with the experts as functions.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (up, top, plan, checkpoint, bench, crd, version):
        module.add_commands(commands)
    return parser


def _exit_status(error: Exception) -> int:
    if isinstance(error, CommandError):
        return error.exit_status
    return 2 if isinstance(error, MoEModelError) else 1
