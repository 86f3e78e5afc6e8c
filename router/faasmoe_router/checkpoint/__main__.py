"""The command line: `python -m faasmoe_router.checkpoint prepare SOURCE STORE | demo-model DIR`.

In a Kubernetes Job, `prepare` also writes a termination message, and removes the hub's downloads
once the store is complete. Until then they are kept, so that a retry resumes the download; from
then on a volume that holds both needs no more room than the store.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from faasmoe_contracts.parent_death import ParentDeathError, die_with_parent
from faasmoe_contracts.store import Manifest, QuantizationEntry, Store, StoreError
from faasmoe_contracts.store.quantization import (
    EXPERTS_QUANTIZATIONS,
    ROUTER_QUANTIZATIONS,
    relative_error,
)
from faasmoe_contracts.store.references import STORE_MODES, StoreMode, describe_weights
from faasmoe_router.checkpoint.progress_bar import ProgressBar
from faasmoe_router.checkpoint.termination_message import exit_status, run_with_termination_log
from faasmoe_router.errors import PrepareError
from faasmoe_transformers.errors import UnsupportedVersions
from faasmoe_transformers.version_check import CHECKPOINT_MODULES, check_private_names

logger = logging.getLogger(__name__)

DTYPE_NAMES = ("bfloat16", "float16", "float32")
Found = TypeVar("Found")


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
    command.add_argument(
        "source",
        help="folder, GGUF file, file:///PATH, hf://ORG/NAME, ORG/NAME, s3://BUCKET/PATH, "
        "gs://BUCKET/PATH or https://HOST/PATH",
    )
    command.add_argument("store", type=Path, help="folder of the store")
    command.add_argument("--revision", help="branch, tag or commit of the hub repository")
    command.add_argument("--dtype", choices=DTYPE_NAMES, help="default: the checkpoint's")
    command.add_argument(
        "--quantize",
        choices=EXPERTS_QUANTIZATIONS,
        default="none",
        help="scheme of the experts' weights; 4 bits are lossy; none keeps the codes of a "
        "quantised checkpoint where kernels read them (default: %(default)s)",
    )
    command.add_argument(
        "--quantize-router",
        choices=ROUTER_QUANTIZATIONS,
        default="none",
        help="scheme of the router's linear layers, gates excluded; with int4 the LM head is int8 "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--mode",
        choices=STORE_MODES,
        help="auto: refer to tensors that lie in the checkpoint as they are served, which must "
        "then stay, and copy the rest; reference: the same, but fail if an experts layer must be "
        "copied; copy: copy all (default: auto, or copy with --discard-download)",
    )
    command.add_argument(
        "--share-with",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="share files with a store, or with all stores of a folder, where experts or tensors "
        "of the router are equal: by hard links; repeat it for several",
    )
    command.add_argument("--force", action="store_true", help="replace a store of another source")
    command.add_argument(
        "--allow-nonfinite",
        action="store_true",
        help="accept weights that are NaN or infinite, which are refused otherwise",
    )
    command.add_argument(
        "--existing",
        action="store_true",
        help="accept a complete store of this source in STORE, which may be read-only; nothing is "
        "prepared, and the checkpoint is not looked at",
    )
    command.add_argument(
        "--termination-log",
        type=Path,
        metavar="FILE",
        help="for a Kubernetes Job: write the outcome to FILE as JSON; a complete store of this "
        "source is accepted without contacting the hub or reading its weights again",
    )
    command.add_argument(
        "--discard-download",
        type=Path,
        metavar="FOLDER",
        help="remove FOLDER, where HF_HOME keeps the hub's downloads, once the store is complete; "
        "until then a retry resumes the download",
    )
    command.set_defaults(run=_run_prepare)
    command = commands.add_parser("demo-model", help="build the demo model's checkpoint")
    command.add_argument("folder", type=Path, help="folder of the checkpoint")
    command.add_argument("--exact", action="store_true", help="logits equal the dense model's")
    command.set_defaults(run=_run_demo_model)
    return parser


def _run_prepare(args: argparse.Namespace) -> int:
    termination_log: Path | None = args.termination_log
    downloads: Path | None = args.discard_download
    store = (
        _store(args)
        if termination_log is None
        else run_with_termination_log(lambda: _store(args), termination_log)
    )
    if downloads is not None:
        _remove_downloads(downloads)
    model, layers = store.manifest.model, store.manifest.layers
    n_lean_kernels = sum(layer.kernel is not None for layer in layers)
    print(f"{store.path}: {model.architecture}, {model.dtype}")
    print(
        f"{len(layers)} MoE layers, {n_lean_kernels} with the lean kernel; {store.manifest.digest}"
    )
    for line in describe_weights(len(layers), store.manifest.checkpoint):
        print(f"weights: {line}")
    for line in describe_quantization(store.manifest):
        print(line)
    return 0


def describe_quantization(manifest: Manifest) -> Iterator[str]:
    """Yield lines on what is quantised and what it lost, per layer and in all."""
    for layer in manifest.layers:
        if entries := list(layer.quantization.values()):
            schemes = ", ".join(sorted({entry.scheme for entry in entries}))
            error = relative_error(entries)
            what = f"relative error {error:.2e}" if error else "as published"
            yield f"layer {layer.index}: {schemes}, {what}"
    experts = [entry for layer in manifest.layers for entry in layer.quantization.values()]
    router = list(manifest.router.quantized.values())
    for part, scheme, entries in (
        ("experts", manifest.quantization.experts, experts),
        ("router", manifest.quantization.router, router),
    ):
        if scheme != "none":
            note = "" if scheme == "int8" else " (lossy)"
            error = relative_error(entries)
            what = f"relative error {error:.2e}" if error else "as published"
            yield f"{part}: {scheme}{note}, {len(entries)} weights, {what}"


def _store(args: argparse.Namespace) -> Store:
    """Return the store of the arguments; prepare it unless it is complete."""
    if args.existing:
        _check_versions()
        from faasmoe_router.checkpoint.prepare import require_complete_store

        return _looked_up(require_complete_store, args)
    is_job = args.termination_log is not None
    return (_existing_store(args) if is_job else None) or _prepare_store(args)


def _existing_store(args: argparse.Namespace) -> Store | None:
    _check_downloads_folder(args)
    if args.force:
        return None
    _check_versions()
    from faasmoe_router.checkpoint.prepare import find_complete_store

    return _looked_up(find_complete_store, args)


def _looked_up(look_up: Callable[..., Found], args: argparse.Namespace) -> Found:
    """Return what a function finds of the store of the arguments."""
    return look_up(
        args.source,
        args.store,
        revision=args.revision,
        dtype=args.dtype,
        quantization=_quantization(args),
    )


def _mode(args: argparse.Namespace) -> StoreMode:
    """Return the mode of the store; raises PrepareError if what it refers to would be removed."""
    if args.discard_download is None:
        return StoreMode(args.mode or "auto")
    if args.mode == "reference":
        raise PrepareError(
            "mode: got reference together with --discard-download, expected copy: the store would "
            "refer to files that are removed"
        )
    return StoreMode.COPY


def _quantization(args: argparse.Namespace) -> QuantizationEntry:
    return QuantizationEntry(experts=args.quantize, router=args.quantize_router)


def _prepare_store(args: argparse.Namespace) -> Store:
    _check_downloads_folder(args)
    _check_versions()
    from faasmoe_router.checkpoint.prepare import prepare

    with ProgressBar() as bar:
        return prepare(
            args.source,
            args.store,
            revision=args.revision,
            dtype=args.dtype,
            quantization=_quantization(args),
            mode=_mode(args),
            force=args.force,
            allows_nonfinite=args.allow_nonfinite,
            share_with=args.share_with,
            progress=bar,
        )


def _check_versions() -> None:
    """Raise PrepareError if torch or transformers lack names that a preparation uses.

    Called before modules that import these names, which would fail without naming the remedy.
    """
    try:
        check_private_names(CHECKPOINT_MODULES)
    except UnsupportedVersions as error:
        raise PrepareError(str(error)) from error


def _check_downloads_folder(args: argparse.Namespace) -> None:
    """Raise PrepareError if removing the downloads would remove the store."""
    downloads: Path | None = args.discard_download
    store: Path = args.store
    if downloads is not None and store.resolve().is_relative_to(downloads.resolve()):
        raise PrepareError(
            f"discard-download: got {downloads}, expected a folder that does not contain the "
            f"store {store}"
        )


def _remove_downloads(downloads: Path) -> None:
    """Remove the downloads; a failure is only logged, since the store is complete without them."""
    if not downloads.exists():
        return
    try:
        shutil.rmtree(downloads)
    except OSError as error:
        logger.warning("could not remove the downloads %s: %s", downloads, error)
    else:
        logger.info("removed the downloads %s: the store is complete", downloads)


def _run_demo_model(args: argparse.Namespace) -> int:
    from faasmoe_router.checkpoint.demo import make_demo_model

    make_demo_model(args.folder, exact=args.exact)
    return 0


if __name__ == "__main__":
    sys.exit(main())
