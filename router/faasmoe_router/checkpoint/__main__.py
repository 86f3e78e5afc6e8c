"""`python -m faasmoe_router.checkpoint prepare SOURCE STORE` and `... demo-model DIR`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from faasmoe_expert.lifeline import LifelineError, die_with_parent
from faasmoe_expert.store import Store, StoreError
from faasmoe_router.checkpoint.architecture import DTYPES
from faasmoe_router.checkpoint.downloads import check_apart, discard
from faasmoe_router.checkpoint.errors import PrepareError
from faasmoe_router.checkpoint.prepare import prepare
from faasmoe_router.checkpoint.progress import Bar
from faasmoe_router.checkpoint.repetition import finished
from faasmoe_router.checkpoint.termination import exit_status, run_logged


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("httpx", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        die_with_parent()
        return int(args.run(args))
    except (PrepareError, StoreError, LifelineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_status(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m faasmoe_router.checkpoint")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("prepare", help="prepare a checkpoint as a store")
    command.add_argument("source", help="folder, file:///FOLDER, hf://ORG/NAME or ORG/NAME")
    command.add_argument("store", type=Path, help="folder of the store")
    command.add_argument("--revision", help="branch, tag or commit of the hub's repository")
    command.add_argument("--dtype", choices=sorted(DTYPES), help="by default the checkpoint's")
    command.add_argument("--force", action="store_true", help="replace a store of another source")
    command.add_argument(
        "--termination-log",
        type=Path,
        metavar="FILE",
        help="for a Kubernetes Job: write what became of it to FILE, as JSON; a complete store of "
        "this source is taken as it is, without asking the hub or reading it again",
    )
    command.add_argument(
        "--discard-download",
        type=Path,
        metavar="FOLDER",
        help="remove FOLDER, in which HF_HOME has the hub's downloads kept, once the store is "
        "complete; until then a retry goes on where the last one ended",
    )
    command.set_defaults(run=_prepare)
    command = commands.add_parser("demo-model", help="make the demo model's checkpoint")
    command.add_argument("folder", type=Path, help="folder of the checkpoint")
    command.add_argument("--exact", action="store_true", help="logits equal the dense model's")
    command.set_defaults(run=_demo_model)
    return parser


def _prepare(args: argparse.Namespace) -> int:
    log: Path | None = args.termination_log
    downloads: Path | None = args.discard_download
    store = (
        _store(args) if log is None else run_logged(lambda: _finished(args) or _store(args), log)
    )
    if downloads is not None:
        discard(downloads)
    manifest = store.manifest
    lean = sum(layer.kernel is not None for layer in manifest.layers)
    print(f"{store.path}: {manifest.model.architecture}, {manifest.model.dtype}")
    print(f"{len(manifest.layers)} MoE layers, {lean} with the lean kernel; {manifest.digest}")
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.discard_download is not None:
        check_apart(args.discard_download, args.store)


def _finished(args: argparse.Namespace) -> Store | None:
    _check(args)
    if args.force:
        return None
    return finished(args.source, args.store, revision=args.revision, dtype=args.dtype)


def _store(args: argparse.Namespace) -> Store:
    _check(args)
    with Bar() as bar:
        return prepare(
            args.source,
            args.store,
            revision=args.revision,
            dtype=args.dtype,
            force=args.force,
            progress=bar,
        )


def _demo_model(args: argparse.Namespace) -> int:
    from faasmoe_router.checkpoint.demo import make_demo_model

    make_demo_model(args.folder, exact=args.exact)
    return 0


if __name__ == "__main__":
    sys.exit(main())
