"""The `faasmoe` entry point: argument parsing and the mapping of errors to exit statuses.

Exit statuses: 0 for success, 1 for failure, 2 for an invalid argument or MoEModel file, 128 + N
after signal N.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from faasmoe_contracts.store import StoreError
from faasmoe_operator.api.v1alpha1 import MoEModelError
from faasmoe_operator.cli import (
    bench,
    chat,
    checkpoint,
    crd,
    doctor,
    explain,
    plan,
    shared_up,
    simulate,
    tenants,
    top,
    version,
)
from faasmoe_operator.errors import CommandError, FaasmoeError

EXIT_INTERRUPTED = 130
COMMANDS = (
    *(shared_up, chat, top, explain, doctor, tenants, plan, simulate, checkpoint, bench, crd),
    version,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand in argv, sys.argv by default, and return its exit status."""
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
    """Return the parser with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="faasmoe",
        description="Serve Mixture-of-Experts language models with experts as serverless\n"
        "functions.",
        epilog="Examples:\n"
        "  faasmoe up ORG/NAME        serve a model of the hub on this machine\n"
        "  faasmoe up ./checkpoint    serve a folder, or a GGUF file\n"
        "  faasmoe up -f model.yaml   serve a MoEModel file, with every setting there is\n"
        "  faasmoe chat               chat with a running model\n"
        "  faasmoe top                watch a running model\n"
        "  faasmoe explain            say why it is not ready, or slow\n"
        "  faasmoe doctor             check this machine\n\n"
        "Run `faasmoe COMMAND --help` for the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in COMMANDS:
        module.add_commands(commands)
    return parser


def _exit_status(error: Exception) -> int:
    if isinstance(error, CommandError):
        return error.exit_status
    return 2 if isinstance(error, MoEModelError) else 1
