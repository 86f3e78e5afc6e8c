"""`faasmoe prepare` and `faasmoe demo-model`: run in the router's package, as a child process."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from faasmoe_contracts.parent_death import PARENT_PID_ENV

COMMAND = (sys.executable, "-m", "faasmoe_router.checkpoint")


def add_commands(commands: Any) -> None:
    """Add both subcommands."""
    parser = commands.add_parser(
        "prepare",
        help="prepare a checkpoint for serving",
        description="Prepare a checkpoint as a store. Safe to interrupt and to repeat.",
    )
    parser.add_argument("source", metavar="SOURCE", help="folder, hf://ORG/NAME or ORG/NAME")
    parser.add_argument("store", metavar="STORE", help="folder of the store")
    parser.add_argument("--revision", help="branch, tag or commit of a hub model")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float16", "float32"),
        help="number format of the store (default: the checkpoint's)",
    )
    parser.add_argument("--force", action="store_true", help="replace a store of another source")
    parser.set_defaults(run=_prepare)
    parser = commands.add_parser(
        "demo-model",
        help="make the demo checkpoint, without any model hub",
        description="Cut SmolLM2-135M-Instruct into a small English-speaking MoE checkpoint.",
    )
    parser.add_argument("folder", metavar="DIR", help="folder of the checkpoint")
    parser.add_argument(
        "--exact", action="store_true", help="logits equal to those of the model it is cut from"
    )
    parser.set_defaults(run=_demo_model)


def prepare_command(
    source: str, store: str, *, revision: str | None, dtype: str | None, force: bool = False
) -> list[str]:
    """Return the command that prepares a store.

    Args:
        source: a folder, file:///FOLDER, hf://ORG/NAME or ORG/NAME.
        store: folder of the store.
        revision: branch, tag or commit; None for the hub's default.
        dtype: number format; None for the checkpoint's.
        force: whether a store of another source is replaced.
    """
    # A folder is written with its whole path, so that the manifest tells where the model is from.
    name = Path(source).resolve().as_uri() if Path(source).is_dir() else source
    command = [*COMMAND, "prepare", name, store]
    command += [f"--revision={revision}"] if revision else []
    command += [f"--dtype={dtype}"] if dtype else []
    return command + ["--force"] * force


def _prepare(arguments: argparse.Namespace) -> int:
    return run_in_foreground(
        prepare_command(
            arguments.source,
            arguments.store,
            revision=arguments.revision,
            dtype=arguments.dtype,
            force=arguments.force,
        )
    )


def _demo_model(arguments: argparse.Namespace) -> int:
    return run_in_foreground(
        [*COMMAND, "demo-model", arguments.folder, *["--exact"] * arguments.exact]
    )


def run_in_foreground(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None
) -> int:
    """Run a command in our place and return its exit status; a Ctrl-C is the child's to handle.

    Args:
        command: what to run.
        environment: variables that it has besides ours.
    """
    full_environment = {**os.environ, PARENT_PID_ENV: str(os.getpid()), **(environment or {})}
    with subprocess.Popen(command, env=full_environment) as child:

        def forward_signal(number: int, _: FrameType | None) -> None:
            child.send_signal(number)

        # The terminal sends SIGINT to both; only what is sent to us alone is passed on.
        previous_handlers = [
            signal.signal(signal.SIGINT, lambda _number, _frame: None),
            signal.signal(signal.SIGTERM, forward_signal),
        ]
        try:
            status = child.wait()
        finally:
            signal.signal(signal.SIGINT, previous_handlers[0])
            signal.signal(signal.SIGTERM, previous_handlers[1])
    return status if status >= 0 else 128 - status
