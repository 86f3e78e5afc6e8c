"""Preparation of a store: streams a checkpoint, parameter by parameter, into the store's files.

Preparation can be interrupted at any time and repeated; finished files are kept. A Kubernetes Job
may run again after its store is complete, because its pod was evicted or the operator was
reinstalled. `find_complete_store` then accepts the store without contacting the hub, which may be
unreachable, and without reading the weights again.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from faasmoe_contracts.store import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    QuantizationEntry,
    Store,
)
from faasmoe_contracts.store.referenced_files import FilePlace
from faasmoe_contracts.store.references import StoreMode
from faasmoe_router.checkpoint.format_report import published_entries
from faasmoe_router.checkpoint.gguf.checkpoint import GgufCheckpoint, find_gguf_checkpoint
from faasmoe_router.checkpoint.hub import HubName
from faasmoe_router.checkpoint.manifest import (
    layer_entries,
    model_entry,
    router_entry,
    with_layer_digests,
    with_references,
)
from faasmoe_router.checkpoint.model_source import load_skeleton, open_tensors
from faasmoe_router.checkpoint.object_store import check_object_url, is_object_url
from faasmoe_router.checkpoint.progress import NoProgress, Progress
from faasmoe_router.checkpoint.reference_digests import verify_references
from faasmoe_router.checkpoint.reference_plan import (
    CheckpointLayout,
    require_references,
)
from faasmoe_router.checkpoint.sharing import find_stores, share_equal_parts
from faasmoe_router.checkpoint.slice_quantizer import QuantizationLoss, SliceQuantizer
from faasmoe_router.checkpoint.source import (
    CheckpointSource,
    read_auxiliary_files,
    resolve_source,
)
from faasmoe_router.checkpoint.store_plan import StorePlan, plan_store
from faasmoe_router.checkpoint.store_writer import StoreFolder, StoreWriter, lock_store_folder
from faasmoe_router.errors import NoSpace, SourceNotFound, SourceUnsupported, StoreMismatch
from faasmoe_transformers.model_skeleton import DTYPES, ModelSkeleton
from faasmoe_transformers.weight_conversion import LazyTensor, ParameterSlice

logger = logging.getLogger(__name__)

_FREE_SPACE_MARGIN_BYTES = 64 << 20
NO_QUANTIZATION = QuantizationEntry()
_COMMIT_PATTERN = re.compile(r"[0-9a-f]{40}")  # unlike branches and tags, commits never move


@dataclass(frozen=True, slots=True)
class StoreTarget:
    """What a preparation makes of a checkpoint.

    Attributes:
        fingerprint: of the checkpoint and of the rest of this.
        dtype: dtype of the store; None for the checkpoint's.
        quantization: what is quantised.
        mode: whether tensors are copied or referred to.
        allows_nonfinite: whether weights may be NaN or infinite.
        stores: the stores whose files are shared.
    """

    fingerprint: str
    dtype: str | None
    quantization: QuantizationEntry
    mode: StoreMode
    allows_nonfinite: bool
    stores: tuple[Store, ...] = ()

    @property
    def journal_fingerprint(self) -> str:
        """Fingerprint that an interrupted preparation resumes with.

        What is finished differs by mode, and by whether it was checked for NaN and infinity.
        """
        mode = "" if self.mode is StoreMode.COPY else "-reference"
        return f"{self.fingerprint}{mode}{'-nonfinite' * self.allows_nonfinite}"


def prepare(
    source: str,
    store: Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    quantization: QuantizationEntry = NO_QUANTIZATION,
    mode: StoreMode = StoreMode.COPY,
    force: bool = False,
    allows_nonfinite: bool = False,
    share_with: Sequence[Path] = (),
    progress: Progress | None = None,
) -> Store:
    """Prepare a checkpoint as a store.

    If the store is complete and of the same checkpoint, its files are verified and left unchanged.
    So is what it refers to in the checkpoint.

    Args:
        source: a folder or GGUF file, its file:// URL, a hub repository (hf://ORG/NAME or
            ORG/NAME), or a folder in an object store or on a web server (s3://, gs://, https://).
        store: the store's folder; created if missing.
        revision: branch, tag or commit of the hub repository.
        dtype: bfloat16, float16 or float32; None keeps the checkpoint's.
        quantization: what to quantise.
        mode: whether to copy tensors or refer to them.
        force: replace a complete store of another checkpoint.
        allows_nonfinite: accept weights that are NaN or infinite.
        share_with: stores, or folders of stores, whose files are shared where weights are equal; a
            store that is complete already stays as it is.
        progress: receives the number of bytes written.

    Raises:
        PrepareError: the checkpoint or the folder cannot be used.
        StoreError: the store is complete but damaged.
    """
    if dtype is not None and dtype not in DTYPES:
        raise SourceUnsupported(f"dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}")
    checkpoint = _resolve(source, revision)
    fingerprint = checkpoint.fingerprint(dtype=dtype, quantization=quantization)
    with lock_store_folder(store) as folder:
        if folder.is_complete:
            if folder.fingerprint() == fingerprint and not force:
                store_mode = _mode_of(folder)
                if mode in (StoreMode.AUTO, store_mode):
                    return _verified_store(folder, progress or NoProgress())
                raise _mode_mismatch(folder, got=store_mode, expected=mode)
            _clear_existing(folder, source, quantization, force=force)
        stores = tuple(find_stores(share_with, without=store))
        target = StoreTarget(fingerprint, dtype, quantization, mode, allows_nonfinite, stores)
        with _open_tensors(checkpoint, allows_nonfinite=allows_nonfinite) as tensors:
            _fill_store(folder, checkpoint, tensors, target, progress or NoProgress())
    return Store.open(store)


def _resolve(source: str, revision: str | None) -> CheckpointSource:
    checkpoint = find_gguf_checkpoint(source, revision=revision)
    return checkpoint or resolve_source(source, revision=revision)


def _open_tensors(
    checkpoint: CheckpointSource, *, allows_nonfinite: bool
) -> AbstractContextManager[dict[str, LazyTensor]]:
    if isinstance(checkpoint, GgufCheckpoint):
        return checkpoint.open_tensors(allows_nonfinite=allows_nonfinite)
    return open_tensors(checkpoint, allows_nonfinite=allows_nonfinite)


def _verified_store(folder: StoreFolder, progress: Progress) -> Store:
    store = Store.open(folder.path)
    files, checkpoint = store.manifest.files, store.manifest.checkpoint
    stored_bytes = sum(file.size_bytes for file in files.values())
    referenced_bytes = checkpoint.bytes_in(*FilePlace) if checkpoint else 0
    progress.start("verifying", total_bytes=stored_bytes + referenced_bytes)
    for name, file in files.items():
        store.verify([name])
        progress.advance(file.size_bytes)
    verify_references(store, progress.advance)
    logger.info("%s is complete and verified", folder.path)
    return store


def _mode_of(folder: StoreFolder) -> StoreMode:
    """Return the mode of a complete store: COPY if it refers to nothing in a checkpoint."""
    checkpoint = Manifest.from_json(
        json.loads((folder.path / MANIFEST_NAME).read_bytes())
    ).checkpoint
    refers = checkpoint is not None and checkpoint.bytes_in(FilePlace.CHECKPOINT) > 0
    return StoreMode.REFERENCE if refers else StoreMode.COPY


def _mode_mismatch(folder: StoreFolder, *, got: StoreMode, expected: StoreMode) -> StoreMismatch:
    return StoreMismatch(
        f"store: got {folder.path} in mode {got}, expected mode {expected}; --force replaces it"
    )


def _clear_existing(
    folder: StoreFolder, source: str, quantization: QuantizationEntry, *, force: bool
) -> None:
    if not force:
        manifest = Store.open(folder.path).manifest
        raise StoreMismatch(
            f"store: got {folder.path}, prepared from {_describe(manifest)}, expected {source!r} "
            f"as it is now{_describe_quantization(quantization)}; --force replaces it"
        )
    folder.clear()


def _describe(manifest: Manifest) -> str:
    model = manifest.model
    quantization = _describe_quantization(manifest.quantization)
    return f"{model.source!r} (revision {model.revision}, {model.dtype}{quantization})"


def _describe_quantization(quantization: QuantizationEntry) -> str:
    return f", quantisation: {quantization}" if quantization else ""


def _fill_store(
    folder: StoreFolder,
    checkpoint: CheckpointSource,
    tensors: Mapping[str, LazyTensor],
    target: StoreTarget,
    progress: Progress,
) -> None:
    dtype = target.dtype
    skeleton = load_skeleton(checkpoint.folder, tensors, dtype)
    model = model_entry(skeleton, checkpoint)  # may reject the config: do it before hours of I/O
    layout = None
    if target.mode is not StoreMode.COPY:
        layout = CheckpointLayout.read(checkpoint.weight_files)
        if layout is None and target.mode is StoreMode.REFERENCE:
            raise SourceUnsupported(
                "mode: got reference, expected auto or copy: the checkpoint has no safetensors "
                f"files in one folder below /: {checkpoint.folder}"
            )
    plan = plan_store(skeleton, tensors, target.quantization, layout)
    if target.mode is StoreMode.REFERENCE:
        require_references(skeleton, plan.references)
    for parameter in plan.referred_codes.values():
        parameter.check_scales()
    published = published_entries(plan)
    for part in published:
        logger.info("%s", part)
    files, losses = folder.start_or_resume(target.journal_fingerprint)
    loss = QuantizationLoss(losses)
    progress.start("preparing", total_bytes=plan.size_bytes + plan.references.size_bytes)
    progress.advance(sum(entry.size_bytes for entry in files.values()))
    _check_free_space(folder.path, plan, files)
    _write_tensors(folder, skeleton, plan, files, loss, progress)
    for name, content in read_auxiliary_files(checkpoint, dtype=dtype):
        files[name] = folder.write_file(name, content)
    quantized = loss.add_to(plan.quantization)
    quantized |= {name: parameter.quantization for name, parameter in plan.kept.items()}
    layers = with_layer_digests(folder.path, layer_entries(skeleton, plan, quantized))
    entry = None
    if layout is not None:
        layers, entry = with_references(
            folder.path,
            layers,
            plan.references,
            layout,
            progress.advance,
            allows_nonfinite=target.allows_nonfinite,
            record=folder.digest_record(),
        )
    manifest = Manifest.create(
        model=model,
        layers=layers,
        files=files,
        quantization=target.quantization,
        router=router_entry(layers, quantized),
        checkpoint=entry,
        published=published,
    )
    if target.stores:
        manifest = share_equal_parts(folder.path, manifest, target.stores, progress)
    folder.commit(manifest, target.fingerprint)


def _check_free_space(path: Path, plan: StorePlan, files: Mapping[str, FileEntry]) -> None:
    finished_bytes = sum(entry.size_bytes for entry in files.values())
    needed_bytes = plan.size_bytes - finished_bytes + _FREE_SPACE_MARGIN_BYTES
    free_bytes = shutil.disk_usage(path).free
    if free_bytes < needed_bytes:
        raise NoSpace(
            f"store: got {free_bytes} bytes free in {path}, expected at least {needed_bytes}"
        )


def _write_tensors(
    folder: StoreFolder,
    skeleton: ModelSkeleton,
    plan: StorePlan,
    files: dict[str, FileEntry],
    loss: QuantizationLoss,
    progress: Progress,
) -> None:
    """Write the tensor files that are not among `files`, and add them to it."""

    def on_file_finished(name: str, entry: FileEntry) -> None:
        folder.record_finished(name, entry, loss.of_tensors(tensors_by_file[name]))
        files[name] = entry

    tensors_by_file = {layout.name: tuple(layout.offsets) for layout in plan.layouts}
    quantizer = SliceQuantizer(plan.quantization, loss)

    unfinished = [layout for layout in plan.layouts if layout.name not in files]
    writer = StoreWriter(
        folder.path,
        unfinished,
        on_file_finished=on_file_finished,
        on_bytes_written=progress.advance,
    )
    try:
        for name, value in plan.initial_values.items():
            writer.write(ParameterSlice(name, 0, value))
        for job in plan.jobs:
            if any(writer.contains(plan.aliases.get(t, t)) for t in job.targets):
                for parameter_slice in plan.slices(job, skeleton.model):
                    if writer.contains(parameter_slice.target):
                        for stored_slice in quantizer.quantize(parameter_slice):
                            writer.write(stored_slice)
    finally:
        writer.close()


def find_complete_store(
    source: str,
    store: Path,
    *,
    revision: str | None,
    dtype: str | None,
    quantization: QuantizationEntry = NO_QUANTIZATION,
) -> Store | None:
    """Return the store if it is complete; None if there is something left to prepare.

    Args:
        source: as for `prepare`; what is not on this machine is compared by name only.
        store: the store's folder.
        revision: as for `prepare`; a commit must be the store's, a branch or tag may have moved.
        dtype: as for `prepare`.
        quantization: as for `prepare`.

    Raises:
        StoreMismatch: the folder holds a complete store of another checkpoint.
        PrepareError: the source is a folder that cannot be read.
        StoreError: the store is complete but damaged.
    """
    if not (store / MANIFEST_NAME).exists():
        return None
    existing = Store.open(store)
    if HubName.of(source) is not None or is_object_url(source):
        return _store_of_request(existing, RemoteRequest(source, revision, dtype, quantization))
    checkpoint = _resolve(source, revision)
    fingerprint = checkpoint.fingerprint(dtype=dtype, quantization=quantization)
    if StoreFolder(store).fingerprint() != fingerprint:
        expected = f"{source!r}{_describe_quantization(quantization)}"
        raise _mismatch(existing.manifest, expected, store)
    return existing


def require_complete_store(
    source: str,
    store: Path,
    *,
    revision: str | None,
    dtype: str | None,
    quantization: QuantizationEntry = NO_QUANTIZATION,
) -> Store:
    """Return a complete store of a checkpoint, which is compared by name and not looked at.

    Args:
        source: as for `prepare`.
        store: the store's folder, which is not written to.
        revision: as for `find_complete_store`.
        dtype: as for `prepare`.
        quantization: as for `prepare`.

    Raises:
        SourceNotFound: the folder holds no store.
        StoreMismatch: it holds a store of another checkpoint.
        StoreError: the store is complete but damaged.
    """
    if not (store / MANIFEST_NAME).exists():
        expected = "a store that `faasmoe prepare --mode copy` wrote"
        raise SourceNotFound(f"store: got {store} without {MANIFEST_NAME}, expected {expected}")
    return _store_of_request(
        Store.open(store), RemoteRequest(source, revision, dtype, quantization)
    )


def _store_of_request(existing: Store, request: RemoteRequest) -> Store:
    """Return the store if it is what is requested; raises PrepareError."""
    if is_object_url(request.source):
        check_object_url(request.source)
    if not request.is_met_by(existing.manifest):
        raise _mismatch(existing.manifest, str(request), existing.path)
    return existing


@dataclass(frozen=True, slots=True)
class RemoteRequest:
    """A requested store of a remote checkpoint; the arguments of `find_complete_store`."""

    source: str
    revision: str | None
    dtype: str | None
    quantization: QuantizationEntry

    def is_met_by(self, existing: Manifest) -> bool:
        """Return whether a store is of this repository, commit, dtype and quantisation."""
        model = existing.model
        is_same_source = model.source.removeprefix("hf://") == self.source.removeprefix("hf://")
        is_commit = _COMMIT_PATTERN.fullmatch(self.revision or "") is not None
        return (
            is_same_source
            and not (is_commit and self.revision != model.revision)
            and self.dtype in (None, model.dtype)
            and self.quantization == existing.quantization
        )

    def __str__(self) -> str:
        """Return the request in words."""
        dtype = self.dtype or "its dtype"
        quantization = _describe_quantization(self.quantization)
        return f"{self.source!r} (revision {self.revision}, {dtype}{quantization})"


def _mismatch(existing: Manifest, expected: str, store: Path) -> StoreMismatch:
    return StoreMismatch(
        f"store: got {store}, prepared from {_describe(existing)}, expected {expected} "
        "as it is now, or an empty folder"
    )
