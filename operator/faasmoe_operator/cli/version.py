"""`faasmoe version`."""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def add_commands(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("version", help="print the version")
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Print the version of the installed distribution."""
    try:
        print(f"faasmoe {version('faasmoe')}")
    except PackageNotFoundError:
        print("faasmoe (run from its sources, not installed)")
    return 0
