"""A folder of the hub's downloads that is of no use any more once the store is complete.

A download is as large as the checkpoint. It is kept while a preparation may have to be tried again,
and a claim that is to hold the store alone need not hold both from then on.

`python -m faasmoe_router.checkpoint prepare SOURCE STORE` and `... demo-model DIR`.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from faasmoe_contracts.parent_death import ParentDeathError, die_with_parent
from faasmoe_contracts.store import Store, StoreError
from faasmoe_router.checkpoint.prepare import ProgressBar, find_complete_store, prepare
from faasmoe_router.checkpoint.termination_message import exit_status, run_with_termination_log
from faasmoe_router.errors import PrepareError
from faasmoe_router.transformers_backend.model_skeleton import DTYPES

logger = logging.getLogger(__name__)


def check_store_outside(downloads: Path, store: Path) -> None:
    """Raise PrepareError if the store would be removed with the downloads."""
    if store.resolve().is_relative_to(downloads.resolve()):
        raise PrepareError(
            f"discard-download: got {downloads}, expected a folder that does not contain the store {store}"
        )


def remove_downloads(downloads: Path) -> None:
    """Remove the downloads; the store is complete without them, so what stays is only told."""
    if not downloads.exists():
        return
    try:
        shutil.rmtree(downloads)
    except OSError as error:
        logger.warning("could not remove the downloads %s: %s", downloads, error)
    else:
        logger.info("removed the downloads %s: the store is complete", downloads)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("httpx", "transformers"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        die_with_parent()
        return int(args.run(args))
    except (PrepareError, StoreError, ParentDeathError, OSError) as error:
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
    command.set_defaults(run=_run_prepare)
    command = commands.add_parser("demo-model", help="make the demo model's checkpoint")
    command.add_argument("folder", type=Path, help="folder of the checkpoint")
    command.add_argument("--exact", action="store_true", help="logits equal the dense model's")
    command.set_defaults(run=_run_demo_model)
    return parser


def _run_prepare(args: argparse.Namespace) -> int:
    termination_log: Path | None = args.termination_log
    downloads: Path | None = args.discard_download
    store = (
        _prepare_store(args)
        if termination_log is None
        else run_with_termination_log(
            lambda: _existing_store(args) or _prepare_store(args), termination_log
        )
    )
    if downloads is not None:
        remove_downloads(downloads)
    manifest = store.manifest
    n_lean_kernels = sum(layer.kernel is not None for layer in manifest.layers)
    print(f"{store.path}: {manifest.model.architecture}, {manifest.model.dtype}")
    print(
        f"{len(manifest.layers)} MoE layers, {n_lean_kernels} with the lean kernel; {manifest.digest}"
    )
    return 0


def _check_downloads_folder(args: argparse.Namespace) -> None:
    if args.discard_download is not None:
        check_store_outside(args.discard_download, args.store)


def _existing_store(args: argparse.Namespace) -> Store | None:
    _check_downloads_folder(args)
    if args.force:
        return None
    return find_complete_store(args.source, args.store, revision=args.revision, dtype=args.dtype)


def _prepare_store(args: argparse.Namespace) -> Store:
    _check_downloads_folder(args)
    with ProgressBar() as bar:
        return prepare(
            args.source,
            args.store,
            revision=args.revision,
            dtype=args.dtype,
            force=args.force,
            progress=bar,
        )


def _run_demo_model(args: argparse.Namespace) -> int:
    from faasmoe_router.checkpoint.demo import make_demo_model

    make_demo_model(args.folder, exact=args.exact)
    return 0


if __name__ == "__main__":
    sys.exit(main())
