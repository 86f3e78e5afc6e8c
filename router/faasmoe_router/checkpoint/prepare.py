"""Preparing a store: streams a checkpoint, parameter by parameter, into the store's files."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

from faasmoe_expert.store import FileEntry, Manifest, Store
from faasmoe_router.checkpoint.architecture import DTYPES, Skeleton, build_skeleton, read_config
from faasmoe_router.checkpoint.blueprint import Blueprint, draw
from faasmoe_router.checkpoint.companions import companion_files
from faasmoe_router.checkpoint.conversion import Piece, run_job
from faasmoe_router.checkpoint.description import describe_layers, describe_model, with_digests
from faasmoe_router.checkpoint.errors import NoSpace, SourceUnsupported, StoreMismatch
from faasmoe_router.checkpoint.folder import StoreFolder, locked
from faasmoe_router.checkpoint.progress import Progress, Silent
from faasmoe_router.checkpoint.source import Source, resolve_source
from faasmoe_router.checkpoint.tensors import LazyTensor, first_float_dtype, open_tensors
from faasmoe_router.checkpoint.writer import StoreWriter

_log = logging.getLogger(__name__)
_SPARE_BYTES = 64 << 20


def prepare(
    source: str,
    store: Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Store:
    """Prepare the checkpoint `source` as a store in the folder `store`.

    Safe to interrupt at any moment and to repeat: what is finished is kept. A complete store of the
    same checkpoint is verified and left as it is.

    Args:
        source: a folder, file:///FOLDER, or a hub's repository (hf://ORG/NAME or ORG/NAME).
        store: the folder to fill.
        revision: branch, tag or commit of the hub's repository.
        dtype: bfloat16, float16 or float32; by default the checkpoint's own.
        force: replace a complete store of another checkpoint.
        progress: hears of the bytes written.

    Raises:
        PrepareError: the checkpoint or the folder cannot be used.
        StoreError: the store is complete but damaged.
    """
    if dtype is not None and dtype not in DTYPES:
        raise SourceUnsupported(f"dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}")
    checkpoint = resolve_source(source, revision=revision)
    fingerprint = checkpoint.fingerprint(dtype=dtype)
    with locked(store) as folder:
        if folder.is_complete:
            if folder.origin() == fingerprint and not force:
                return _verified(folder)
            _replace(folder, source, force=force)
        with open_tensors(checkpoint.weight_files) as tensors:
            _fill(folder, checkpoint, tensors, fingerprint, dtype, progress or Silent())
    return Store.open(store)


def _verified(folder: StoreFolder) -> Store:
    store = Store.open(folder.path)
    store.verify()
    _log.info("%s is complete and verified", folder.path)
    return store


def _replace(folder: StoreFolder, source: str, *, force: bool) -> None:
    if not force:
        model = Store.open(folder.path).manifest.model
        raise StoreMismatch(
            f"store: got {folder.path}, prepared from {model.source!r} (revision {model.revision}, "
            f"{model.dtype}), which is not what {source!r} is now; --force replaces it"
        )
    folder.clear()


def _fill(
    folder: StoreFolder,
    checkpoint: Source,
    tensors: Mapping[str, LazyTensor],
    fingerprint: str,
    dtype: str | None,
    progress: Progress,
) -> None:
    skeleton = _skeleton(checkpoint, tensors, dtype)
    model = describe_model(skeleton, checkpoint)  # before hours of writing: it may refuse
    blueprint = draw(skeleton, tensors)
    files = folder.begin(fingerprint)
    progress.begin("preparing", total_bytes=blueprint.size_bytes)
    progress.advance(sum(entry.size_bytes for entry in files.values()))
    _check_space(folder.path, blueprint, files)
    _write_tensors(folder, skeleton, blueprint, files, progress)
    for name, content in companion_files(checkpoint, dtype=dtype):
        files[name] = folder.put(name, content)
    layers = with_digests(folder.path, describe_layers(skeleton, blueprint))
    manifest = Manifest.describing(model=model, layers=layers, files=files)
    folder.complete(manifest, fingerprint)


def _skeleton(checkpoint: Source, tensors: Mapping[str, LazyTensor], dtype: str | None) -> Skeleton:
    config = read_config(checkpoint.folder)
    if dtype is not None:
        return build_skeleton(config, DTYPES[dtype])
    return build_skeleton(config, config.dtype or first_float_dtype(tensors))


def _check_space(path: Path, blueprint: Blueprint, files: Mapping[str, FileEntry]) -> None:
    needed = blueprint.size_bytes - sum(entry.size_bytes for entry in files.values())
    free = shutil.disk_usage(path).free
    if free < needed + _SPARE_BYTES:
        raise NoSpace(
            f"store: got {free} bytes free in {path}, expected at least {needed + _SPARE_BYTES}"
        )


def _write_tensors(
    folder: StoreFolder,
    skeleton: Skeleton,
    blueprint: Blueprint,
    files: dict[str, FileEntry],
    progress: Progress,
) -> None:
    def finished(name: str, entry: FileEntry) -> None:
        folder.record(name, entry)
        files[name] = entry

    left = [layout for layout in blueprint.layouts if layout.name not in files]
    writer = StoreWriter(folder.path, left, finished=finished, written=progress.advance)
    try:
        for name, value in blueprint.initial.items():
            writer.write(Piece(name, 0, value))
        for job in blueprint.jobs:
            if any(writer.wants(blueprint.aliases.get(t, t)) for t in job.targets):
                for piece in run_job(job, skeleton.model):
                    writer.write(blueprint.placed(piece))
    finally:
        writer.close()
