"""`faasmoe version`: prints the version of the installed distribution."""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def add_commands(commands: Any) -> None:
    """Add `faasmoe version`."""
    parser = commands.add_parser("version", help="print the version")
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Print the version; a source tree without installed metadata has none."""
    try:
        print(f"faasmoe {version('faasmoe')}")
    except PackageNotFoundError:
        print("faasmoe (running from source, not installed)")
    return 0
