"""`faasmoe crd`: prints, writes or checks the CustomResourceDefinitions."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from faasmoe_operator.api.v1alpha1.tenant_crd import crd_files
from faasmoe_operator.errors import CommandError


def add_commands(commands: Any) -> None:
    """Add `faasmoe crd`."""
    parser = commands.add_parser(
        "crd",
        help="print or write the Kubernetes CRDs",
        description="Print the CustomResourceDefinitions of MoEModel and Tenant.",
        epilog="Example:\n  faasmoe crd | kubectl apply --server-side -f -",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    destination = parser.add_mutually_exclusive_group()
    destination.add_argument(
        "--output", type=Path, metavar="DIR", help="write files to DIR instead of printing"
    )
    destination.add_argument(
        "--check", type=Path, metavar="DIR", help="fail unless the files in DIR are up to date"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print, write or check the CRDs."""
    if arguments.check is not None:
        for name, text in crd_files().items():
            _check_up_to_date(arguments.check / name, text)
    elif arguments.output is not None:
        for name, text in crd_files().items():
            _write_crd(arguments.output / name, text)
    else:
        print("---\n".join(crd_files().values()), end="")
    return 0


def _write_crd(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"--output: {path} cannot be written: {error.strerror}") from error


def _check_up_to_date(path: Path, text: str) -> None:
    try:
        current = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CommandError(f"--check: {path} cannot be read: {error.strerror}") from error
    if current != text:
        raise CommandError(
            f"{path}: not up to date; `faasmoe crd --output {path.parent}` writes it"
        )
