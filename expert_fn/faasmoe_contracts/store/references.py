"""References of a manifest: tensors that lie in a checkpoint, or in files shared with other stores.

A store by reference names the checkpoint's folder and files, and where each tensor's bytes lie in
them. A store that shares experts has hard links of other stores' files below its own folder, and
refers to these and to its own files in the same way. What is referred to must be a regular file
below its folder, of its recorded size: no path in a manifest leads out of it, and no symbolic link
is followed on the way.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any

from faasmoe_contracts.store.json_fields import JsonFields, StoreError
from faasmoe_contracts.store.referenced_files import CheckpointFile, FilePlace, is_path
from faasmoe_contracts.store.tensors import DTYPE_SIZES
from faasmoe_contracts.text import short_repr

BLOCK_DIGEST = re.compile(r"[0-9a-f]{32}")


class StoreMode(StrEnum):
    """Whether a store copies a checkpoint's tensors or refers to them."""

    AUTO = "auto"
    """Refer to what lies in the checkpoint as it is served, copy the rest."""
    COPY = "copy"
    """Copy everything: the store needs no checkpoint."""
    REFERENCE = "reference"
    """As `auto`, but an experts layer that has to be copied is an error."""


STORE_MODES = tuple(mode.value for mode in StoreMode)


@dataclass(frozen=True, slots=True)
class TensorReference:
    """Where the bytes of one tensor lie: pieces of equal size that follow each other.

    Attributes:
        dtype: safetensors dtype name.
        shape: dimensions.
        pieces: index of the file and offset in it, of each piece; one for the whole
            tensor, or one or several for each index of dimension 0.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPE_SIZES[self.dtype]

    @property
    def piece_bytes(self) -> int:
        """Bytes of each piece."""
        return self.size_bytes // len(self.pieces)

    def outer_offsets(self) -> dict[int, tuple[int, int]]:
        """Return the offsets of the first and the last piece in each file, by the file's index."""
        if len({file for file, _ in self.pieces}) == 1:  # as a rule, of thousands of pieces
            offsets = [offset for _, offset in self.pieces]
            return {self.pieces[0][0]: (min(offsets), max(offsets))}
        outer: dict[int, tuple[int, int]] = {}
        for file, offset in self.pieces:
            first, last = outer.get(file, (offset, offset))
            outer[file] = min(first, offset), max(last, offset)
        return outer

    @classmethod
    def from_json(
        cls, value: object, *, files: tuple[CheckpointFile, ...], path: str
    ) -> TensorReference:
        """Parse and check a reference into `files`; raises StoreError naming the field."""
        fields = JsonFields(value, path)
        reference = cls.pop_from(fields, files)
        fields.reject_unknown()
        return reference

    @classmethod
    def pop_from(cls, fields: JsonFields, files: tuple[CheckpointFile, ...]) -> TensorReference:
        """Take a reference's fields from a JSON object; raises StoreError naming the field."""
        dtype, shape = fields.pop_choice("dtype", DTYPE_SIZES), fields.pop_array("shape")
        length, pieces = fields.pop_integer("length", minimum=1), fields.pop_array("pieces")
        if not all(_is_count(n) and n > 0 for n in shape):
            raise fields.error("shape", shape, "positive integers")
        if not pieces or not all(_is_piece(piece, length, files) for piece in pieces):
            raise fields.error(
                "pieces", pieces, f"[index of a file, offset] with {length} bytes inside the file"
            )
        reference = cls(dtype, tuple(shape), tuple((file, offset) for file, offset in pieces))
        n_pieces, rows = len(pieces), shape[0] if shape else 1
        if n_pieces > 1 and n_pieces % rows:
            raise fields.error("pieces", n_pieces, f"one, or a multiple of {rows}")
        if length * n_pieces != reference.size_bytes:
            raise fields.error(
                "length", length, f"{reference.size_bytes} bytes in {n_pieces} pieces"
            )
        return reference

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this reference."""
        return {
            "dtype": self.dtype,
            "shape": list(self.shape),
            "length": self.piece_bytes,
            "pieces": [list(piece) for piece in self.pieces],
        }


@dataclass(frozen=True, slots=True)
class RouterReference:
    """A tensor of the router in the checkpoint, with the digest of its bytes."""

    tensor: TensorReference
    digest: str

    @classmethod
    def from_json(
        cls, value: object, *, files: tuple[CheckpointFile, ...], path: str
    ) -> RouterReference:
        """Parse and check a reference into `files`; raises StoreError naming the field."""
        fields = JsonFields(value, path)
        entry = cls(TensorReference.pop_from(fields, files), fields.pop_string("digest"))
        fields.reject_unknown()
        if not BLOCK_DIGEST.fullmatch(entry.digest):
            raise fields.error("digest", entry.digest, "32 hexadecimal digits")
        if len(entry.tensor.pieces) != 1:
            raise fields.error("pieces", len(entry.tensor.pieces), "one")
        return entry

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this reference."""
        return {**self.tensor.to_json(), "digest": self.digest}


@dataclass(frozen=True, slots=True)
class CheckpointEntry:
    """What a store refers to: files of its checkpoint, of itself, and shared ones.

    Attributes:
        root: its folder: an absolute path, or relative to the store's folder if both lie in one
            folder and so are moved and mounted together; empty, and absent from the JSON, if the
            store refers to its own files and to shared ones only.
        files: the files, by their index in references.
        layers: the parameters of MoE layers that the store holds no copy of, by the layer's index,
            then by name.
        router: the router's tensors that the store holds no copy of, by name.
        copied: names of experts modules and of the router's tensors that the store holds a copy of,
            by the reason.
    """

    root: str
    files: tuple[CheckpointFile, ...]
    layers: Mapping[int, Mapping[str, TensorReference]]
    router: Mapping[str, RouterReference]
    copied: Mapping[str, tuple[str, ...]]

    @property
    def router_bytes(self) -> int:
        """Bytes of the router's tensors that the store refers to."""
        return sum(reference.tensor.size_bytes for reference in self.router.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors that the store refers to, without those in files of its own."""
        return self.bytes_in(FilePlace.CHECKPOINT) + self.bytes_in(FilePlace.SHARED)

    def bytes_in(self, *places: FilePlace) -> int:
        """Return the bytes of all tensors that the store refers to in these places."""
        return sum(
            tensor.piece_bytes
            for tensor in self._tensors()
            for file, _ in tensor.pieces
            if self.files[file].place in places
        )

    def _tensors(self) -> Iterator[TensorReference]:
        for layer in self.layers.values():
            yield from layer.values()
        for reference in self.router.values():
            yield reference.tensor

    @classmethod
    def from_json(cls, value: object, *, path: str = "checkpoint") -> CheckpointEntry:
        """Parse the entry; raises StoreError naming the field."""
        fields = JsonFields(value, path)
        root = fields.pop_string("root") if fields.has("root") else ""
        entries = fields.pop_array("files")
        layers, router = fields.pop_object("layers"), fields.pop_object("router")
        copied = fields.pop_object("copied")
        fields.reject_unknown()
        files = tuple(
            CheckpointFile.from_json(v, path=f"{path}.files[{i}]") for i, v in enumerate(entries)
        )
        if root or any(file.place is FilePlace.CHECKPOINT for file in files):
            _check_root(root, fields)
        return cls(
            root,
            files,
            {
                _layer_index(index, path): _references_from_json(
                    JsonFields(layer, f"{path}.layers[{index}]").all(),
                    files=files,
                    path=f"{path}.layers[{index}]",
                )
                for index, layer in layers.items()
            },
            {
                name: RouterReference.from_json(value, files=files, path=f"{path}.router[{name!r}]")
                for name, value in router.items()
            },
            {
                reason: _parse_names(names, f"{path}.copied[{reason!r}]")
                for reason, names in copied.items()
            },
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object of this entry."""
        files = [file.to_json() for file in self.files]
        layers = {
            str(index): {name: tensor.to_json() for name, tensor in sorted(layer.items())}
            for index, layer in sorted(self.layers.items())
        }
        router = {name: reference.to_json() for name, reference in sorted(self.router.items())}
        copied = {reason: list(names) for reason, names in sorted(self.copied.items())}
        return {
            **({"root": self.root} if self.root else {}),
            "files": files,
            "layers": layers,
            "router": router,
            "copied": copied,
        }

    def folder(self, store: Path) -> Path:
        """Return the checkpoint's folder, without symbolic links, for the store's folder."""
        return Path(os.path.realpath(os.path.join(os.path.realpath(store), self.root)))

    def path_of(self, store: Path, index: int) -> Path:
        """Return the path of a file for the store's folder, unchecked."""
        file = self.files[index]
        if file.place is FilePlace.CHECKPOINT:
            return self.folder(store) / file.name
        return Path(os.path.realpath(store)) / file.name

    def check_file(self, store: Path, index: int) -> Path:
        """Return the path of a file after checking it.

        Args:
            store: the store's folder.
            index: index of the file.

        Raises:
            StoreError: it is missing, no regular file, outside its folder or of another size.
        """
        file, path = self.files[index], self.path_of(store, index)
        try:
            status = path.lstat()
        except OSError as error:
            raise StoreError(
                f"{path}: cannot be read: {error.strerror}: the store {store} refers to this file "
                f"{file.kind}; {file.remedy}"
            ) from error
        if Path(os.path.realpath(path)) != path:
            raise StoreError(f"{path}: got a path through a symbolic link, expected none")
        if not stat.S_ISREG(status.st_mode):
            raise StoreError(f"{path}: got no regular file, expected one")
        if status.st_size != file.size_bytes:
            raise StoreError(
                f"{path}: size: got {status.st_size} bytes, expected {file.size_bytes}: "
                f"{file.subject} changed since {store} was prepared; {file.remedy}"
            )
        return path


def _check_root(root: str, fields: JsonFields) -> None:
    """Raise StoreError unless a checkpoint's folder is absolute or beside the store's."""
    if not root or not is_path(root) or not (os.path.isabs(root) or _is_beside(root)):
        raise fields.error("root", root, "an absolute path, or ../NAME")
    if Path(root).anchor == root:
        raise fields.error("root", root, "a folder below the root of the file system")


def _references_from_json(
    value: Mapping[str, Any], *, files: tuple[CheckpointFile, ...], path: str
) -> dict[str, TensorReference]:
    """Parse references by the tensor's name; raises StoreError naming the field."""
    return {
        name: TensorReference.from_json(entry, files=files, path=f"{path}[{name!r}]")
        for name, entry in value.items()
    }


def _parse_names(value: object, path: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise StoreError(f"{path}: got {short_repr(value)}, expected an array of names")
    return tuple(value)


def _layer_index(text: str, path: str) -> int:
    if not text.isascii() or not text.isdigit() or str(int(text)) != text:
        raise StoreError(f"{path}.layers: got the index {text!r}, expected an integer")
    return int(text)


def checkpoint_root(checkpoint: Path, store: Path) -> str:
    """Return how a store names its checkpoint's folder; both without symbolic links."""
    relative = os.path.relpath(checkpoint, store)
    return relative if _is_beside(relative) else str(checkpoint)


def _is_beside(root: str) -> bool:
    """Return whether a relative path leads to a folder beside the store's, or below one."""
    up, *names = PurePosixPath(root).parts
    return up == ".." and bool(names) and ".." not in names and "/".join((up, *names)) == root


def _is_piece(value: object, length: int, files: tuple[CheckpointFile, ...]) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(_is_count(number) for number in value)
        and value[0] < len(files)
        and value[1] + length <= files[value[0]].size_bytes
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def describe_files(paths: tuple[Path, ...]) -> str:
    """Return the names of files for a message."""
    return ", ".join(map(str, paths[:2])) + (" and others" if len(paths) > 2 else "")


def describe_weights(layers: int, checkpoint: CheckpointEntry | None) -> list[str]:
    """Return lines on where a store's weights lie: what it refers to, what it copied and why.

    Args:
        layers: number of MoE layers.
        checkpoint: the manifest's entry; None if the store was prepared by copying all.
    """
    if checkpoint is None:
        return ["copied into the store"]
    lines = []
    if size_bytes := checkpoint.bytes_in(FilePlace.CHECKPOINT):
        referring = [_has_piece(checkpoint, tensor) for tensor in checkpoint.layers.values()]
        router = [_has_piece(checkpoint, {"": r.tensor}) for r in checkpoint.router.values()]
        lines.append(
            f"{size_bytes / 1e9:.2f} GB by reference to {checkpoint.root}, which must "
            f"stay: {sum(referring)} of {layers} MoE layers, {sum(router)} "
            "tensors of the router"
        )
    if size_bytes := checkpoint.bytes_in(FilePlace.SHARED):
        origins = tuple(Path(file.origin) for file in checkpoint.files if file.origin)
        lines.append(
            f"{size_bytes / 1e9:.2f} GB shared with other stores, by hard links of "
            f"{describe_files(origins)}"
        )
    for reason, names in checkpoint.copied.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"copied: {names[0]}{more}: {reason}")
    return lines


def _has_piece(checkpoint: CheckpointEntry, tensors: Mapping[str, TensorReference]) -> bool:
    """Return whether some of these tensors' bytes lie in the checkpoint."""
    return any(
        checkpoint.files[file].place is FilePlace.CHECKPOINT
        for tensor in tensors.values()
        for file, _ in tensor.pieces
    )
