"""`faasmoe top`: what a running model's functions and sandboxes do, again and again."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from pathlib import Path
from typing import Any

from faasmoe_operator.cli.control import fetch_status
from faasmoe_operator.cli.frame import draw
from faasmoe_operator.cli.interruption import interruptible
from faasmoe_operator.cli.runtime import Running, find_running
from faasmoe_operator.errors import CommandError

TOKEN_VARIABLE = "FAASMOE_TOKEN"
CLEAR = "\x1b[H\x1b[2J"
DEFAULT_LINES = 30


def add_commands(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "top",
        help="show a running model's functions and sandboxes",
        description="Show functions by state, replicas, load and memory of a running model. Finds "
        f"`faasmoe up` of this user by itself; --url and {TOKEN_VARIABLE} name another control.",
    )
    parser.add_argument("-f", "--file", type=Path, help="MoEModel file, if several are served")
    parser.add_argument("--url", help=f"address of a control API; its token in {TOKEN_VARIABLE}")
    parser.add_argument("--once", action="store_true", help="print once and end")
    parser.add_argument(
        "--interval", type=_positive, default=2.0, metavar="S", help="seconds (%(default)s)"
    )
    parser.add_argument(
        "--lines", type=int, default=DEFAULT_LINES, help="functions at most (%(default)s)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print frames until a signal, or one."""
    url, token = _address(arguments)
    return asyncio.run(interruptible(_top(url, token, arguments)))


async def _top(url: str, token: str, arguments: argparse.Namespace) -> int:
    begin = "" if arguments.once or not sys.stdout.isatty() else CLEAR
    while True:
        frame = draw(await fetch_status(url, token=token), max_lines=arguments.lines)
        print(f"{begin}{frame}", flush=True)
        if arguments.once:
            return 0
        await asyncio.sleep(arguments.interval)


def _address(arguments: argparse.Namespace) -> tuple[str, str]:
    if arguments.url is not None:
        return arguments.url.rstrip("/"), os.environ.get(TOKEN_VARIABLE, "")
    found = [entry for entry in find_running() if _is_meant(entry, arguments.file)]
    if len(found) != 1:
        names = ", ".join(f"{entry.name} ({entry.file})" for entry in found)
        what = f"several run: {names}; name one with --file" if found else "none runs"
        raise CommandError(f"faasmoe up: {what}")
    return found[0].control_url, found[0].token


def _is_meant(entry: Running, file: Path | None) -> bool:
    return file is None or str(file.resolve()) == entry.file


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected 0.1 to 3600 seconds")
    return value
