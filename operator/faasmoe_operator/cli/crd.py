"""`faasmoe crd`: prints, writes or checks the CustomResourceDefinition of MoEModel."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from faasmoe_operator.api.v1alpha1.crd import CRD_FILE_NAME, render_crd_yaml
from faasmoe_operator.errors import CommandError


def add_commands(commands: Any) -> None:
    """Add `faasmoe crd`."""
    parser = commands.add_parser(
        "crd",
        help="print or write the Kubernetes CRD",
        description="Print the CustomResourceDefinition of MoEModel.",
        epilog="Example:\n  faasmoe crd | kubectl apply --server-side -f -",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    destination = parser.add_mutually_exclusive_group()
    destination.add_argument(
        "--output", type=Path, metavar="DIR", help=f"write DIR/{CRD_FILE_NAME} instead of printing"
    )
    destination.add_argument(
        "--check", type=Path, metavar="DIR", help=f"fail unless DIR/{CRD_FILE_NAME} is up to date"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print, write or check the CRD."""
    if arguments.check is not None:
        _check_up_to_date(arguments.check / CRD_FILE_NAME)
    elif arguments.output is not None:
        _write_crd(arguments.output / CRD_FILE_NAME)
    else:
        print(render_crd_yaml(), end="")
    return 0


def _write_crd(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render_crd_yaml(), encoding="utf-8")
    except OSError as error:
        raise CommandError(f"--output: {path} cannot be written: {error.strerror}") from error


def _check_up_to_date(path: Path) -> None:
    try:
        current = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CommandError(f"--check: {path} cannot be read: {error.strerror}") from error
    if current != render_crd_yaml():
        raise CommandError(
            f"{path}: not up to date; `faasmoe crd --output {path.parent}` writes it"
        )
