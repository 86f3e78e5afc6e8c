"""`faasmoe crd`: the CustomResourceDefinition of the MoEModel, for a cluster."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from faasmoe_operator.errors import CommandError
from faasmoe_operator.spec.crd import FILE_NAME, crd_yaml


def add_commands(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "crd",
        help="print or write the Kubernetes CRD",
        description="Print the CustomResourceDefinition of the MoEModel, for `kubectl apply "
        "--server-side -f -`.",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", type=Path, metavar="DIR", help=f"write DIR/{FILE_NAME}")
    where.add_argument(
        "--check", type=Path, metavar="DIR", help=f"fail unless DIR/{FILE_NAME} is up to date"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print, write or compare it."""
    if arguments.check is not None:
        _check(arguments.check / FILE_NAME)
    elif arguments.output is not None:
        _write(arguments.output / FILE_NAME)
    else:
        print(crd_yaml(), end="")
    return 0


def _write(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(crd_yaml(), encoding="utf-8")
    except OSError as error:
        raise CommandError(f"--output: {path} cannot be written: {error.strerror}") from error


def _check(path: Path) -> None:
    try:
        held = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CommandError(f"--check: {path} cannot be read: {error.strerror}") from error
    if held != crd_yaml():
        raise CommandError(
            f"{path}: not up to date; `faasmoe crd --output {path.parent}` writes it"
        )
