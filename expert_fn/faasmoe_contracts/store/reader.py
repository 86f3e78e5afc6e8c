"""Opens a store: reads the manifest, checks file sizes and digests, maps layers."""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from faasmoe_contracts.store.json_fields import StoreError
from faasmoe_contracts.store.manifest import LayerEntry, Manifest
from faasmoe_contracts.store.references import TensorReference
from faasmoe_contracts.store.tensors import (
    MappedFile,
    MappedLayer,
    MappedPieces,
    TensorView,
    map_range,
    map_tensors,
)

MANIFEST_NAME = "manifest.json"
MAX_MANIFESTS = 8  # that a process keeps; one of 30 layers takes 8 ms to parse


@dataclass(frozen=True, slots=True)
class Store:
    """A complete store in a directory.

    Attributes:
        path: the directory.
        manifest: its parsed manifest.
    """

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """Open the store in `path` and check that every file exists with its size.

        Does not compute digests, see `verify`.

        Raises:
            StoreError: there is no complete store, or a file or a field is invalid.
        """
        folder = Path(path)
        store = cls(folder, MANIFESTS.read(folder))
        for name in store.manifest.files:
            store._check_size(name)
        if checkpoint := store.manifest.checkpoint:
            for index in range(len(checkpoint.files)):
                checkpoint.check_file(folder, index)
        return store

    def map_layer(self, index: int) -> MappedLayer:
        """Map the parameters of the MoE layer `index` without copying them.

        Raises:
            StoreError: the layer does not exist, or its file does not match the manifest.
        """
        layer = self.layer_entry(index)
        if layer.file:
            self._check_size(layer.file)
            mapped, name = map_tensors(self.path / layer.file), f"{self.path / layer.file}"
        else:
            assert self.manifest.checkpoint is not None  # checked by the manifest
            references = self.manifest.checkpoint.layers[index]
            mapped = self._map_references(references)
            name = f"{self.path / MANIFEST_NAME}: layer {index}"
        try:
            _check_quantized_tensors(mapped, layer)
            _check_layer_sizes(mapped, layer)
        except StoreError as error:
            raise StoreError(f"{name}: {error}") from None
        return mapped

    def map_router_references(self) -> MappedLayer:
        """Map the router's tensors that lie in the checkpoint; raises StoreError."""
        checkpoint = self.manifest.checkpoint
        router = checkpoint.router if checkpoint else {}
        return self._map_references({name: entry.tensor for name, entry in router.items()})

    def router_reference_paths(self) -> list[Path]:
        """Return the files of the checkpoint with tensors of the router; raises StoreError."""
        checkpoint = self.manifest.checkpoint
        if checkpoint is None:
            return []
        files = {file for entry in checkpoint.router.values() for file, _ in entry.tensor.pieces}
        return [checkpoint.check_file(self.path, file) for file in sorted(files)]

    def _map_references(self, references: Mapping[str, TensorReference]) -> MappedLayer:
        """Map what references point to: of each file, the part from the first to the last byte."""
        checkpoint = self.manifest.checkpoint
        files: dict[int, tuple[int, MappedFile]] = {}
        for position, (file, (start, end)) in enumerate(sorted(_byte_ranges(references).items())):
            assert checkpoint is not None
            path, entry = checkpoint.check_file(self.path, file), checkpoint.files[file]
            mapped = map_range(path, size_bytes=entry.size_bytes, start=start, end=end)
            files[file] = position, mapped
        tensors = {
            name: TensorView(
                reference.dtype,
                reference.shape,
                MappedPieces(reference.pieces, reference.piece_bytes, files),
            )
            for name, reference in references.items()
        }
        return MappedLayer(
            tensors,
            sum(view.nbytes for view in tensors.values()),
            tuple(mapped for _, mapped in files.values()),
        )

    def layer_entry(self, index: int) -> LayerEntry:
        """Return the manifest entry of the MoE layer `index`; raises StoreError if out of range."""
        if not 0 <= index < len(self.manifest.layers):
            valid_range = f"0 to {len(self.manifest.layers) - 1}"
            raise StoreError(f"{self.path}: layer: got {index}, expected {valid_range}")
        return self.manifest.layers[index]

    def router_files(self) -> list[Path]:
        """Return the safetensors files with the router's tensors, sorted by name."""
        return [self.path / n for n in sorted(self.manifest.files) if n.startswith("router/")]

    def verify(self, files: Iterable[str] | None = None) -> None:
        """Check the size and SHA-256 of `files` (names in the manifest, all by default).

        Raises:
            StoreError: a file is missing or differs in size or content; the message names it.
        """
        for name in self.manifest.files if files is None else files:
            if name not in self.manifest.files:
                raise StoreError(
                    f"{self.path}: got the file {name!r}, expected a file of the manifest"
                )
            self._check_size(name)
            got, expected = sha256_of_file(self.path / name), self.manifest.files[name].sha256
            if got != expected:
                raise StoreError(f"{self.path / name}: sha256: got {got}, expected {expected}")

    def _check_size(self, name: str) -> None:
        path, expected = self.path / name, self.manifest.files[name].size_bytes
        try:
            status = path.stat()
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):
            raise StoreError(f"{path}: got no regular file, expected one")
        got = status.st_size
        if got != expected:
            raise StoreError(f"{path}: size: got {got} bytes, expected {expected}")


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal; raises StoreError if it is unreadable."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from error


def _byte_ranges(references: Mapping[str, TensorReference]) -> dict[int, tuple[int, int]]:
    """Return the offsets of the first byte and behind the last one, by the index of the file."""
    ranges: dict[int, tuple[int, int]] = {}
    for reference in references.values():
        for file, (first, last) in reference.outer_offsets().items():
            start, end = ranges.get(file, (first, 0))
            ranges[file] = min(start, first), max(end, last + reference.piece_bytes)
    return ranges


class ManifestCache:
    """The manifests that were parsed last, by the content of their files.

    A process that opens a store again reads its manifest and parses nothing; nor does a process
    that was forked after its parent had opened it, or one of equal content.

    Args:
        size: how many are kept.
    """

    def __init__(self, *, size: int = MAX_MANIFESTS) -> None:
        self._size = size
        self._manifests: dict[bytes, Manifest] = {}  # the one used last is the last

    def read(self, folder: Path) -> Manifest:
        """Return the manifest in a folder; raises StoreError."""
        path = folder / MANIFEST_NAME
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise StoreError(f"{path}: not found: no store, or prepare has not finished") from None
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error}") from error
        digest = hashlib.sha256(content).digest()
        manifest = self._manifests.pop(digest, None) or _parse_manifest(path, content)
        self._manifests[digest] = manifest
        while len(self._manifests) > self._size:
            self._manifests.pop(next(iter(self._manifests)), None)
        return manifest


MANIFESTS = ManifestCache()
"""This process's; a forked one has what its parent had."""


def _parse_manifest(path: Path, content: bytes) -> Manifest:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise StoreError(f"{path}: cannot be read: {error}") from error
    try:
        return Manifest.from_json(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: invalid JSON: {error}") from error
    except StoreError as error:
        raise StoreError(f"{path}: {error}") from None


def _check_quantized_tensors(mapped: MappedLayer, layer: LayerEntry) -> None:
    """Raise StoreError unless codes and scales have the dtypes and shapes that the entry names."""
    tensors = {name: (view.dtype, view.shape) for name, view in mapped.tensors.items()}
    for name, quantization in layer.quantization.items():
        quantization.check_tensors(name, tensors, leading=(layer.num_experts,))


def _check_layer_sizes(mapped: MappedLayer, layer: LayerEntry) -> None:
    """Raise StoreError unless the tensor sizes match the manifest entry."""
    stacked = [t for t in mapped.tensors.values() if t.is_stacked(layer.num_experts)]
    stacked_bytes = sum(tensor.nbytes for tensor in stacked)
    expected = layer.expert_bytes * layer.num_experts
    if stacked_bytes != expected:
        raise StoreError(f"expert tensors: got {stacked_bytes} bytes, expected {expected}")
    shared_bytes = mapped.size_bytes - stacked_bytes
    if shared_bytes != layer.shared_bytes:
        raise StoreError(f"shared tensors: got {shared_bytes} bytes, expected {layer.shared_bytes}")
