"""Writing a store: its files, and its folder while it is prepared.

A file is written under a `.partial` name and renamed when it is complete and durable. A journal
records the fingerprint of the checkpoint and each finished file with its digest, so that an
interrupted preparation resumes. The manifest is written last and makes the folder a store; then the
journal is removed. A lock keeps out concurrent preparations of the same folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from faasmoe_contracts.atomic_file import fsync_folder, write_atomically
from faasmoe_contracts.store import (
    MANIFEST_NAME,
    STORE_FORMAT,
    FileEntry,
    Manifest,
    StoreError,
    sha256_of_file,
)
from faasmoe_contracts.store.referenced_files import SHARED_FOLDER
from faasmoe_router.checkpoint.store_plan import FileLayout
from faasmoe_router.errors import PrepareError, StoreMismatch
from faasmoe_transformers.weight_conversion import ParameterSlice

PARTIAL_SUFFIX = ".partial"
_LOCK_NAME, _JOURNAL_NAME, _FINGERPRINT_NAME = ".lock", ".journal", ".origin.json"
_STORE_FOLDERS = ("experts", "router", "model", SHARED_FOLDER)
_IGNORED_ENTRIES = ("lost+found",)  # present on a freshly formatted volume


class PartialStoreFile:
    """A safetensors file that is being written; its slices may be written in any order.

    Args:
        folder: the store's folder.
        layout: the file's header, tensor offsets and size.
    """

    def __init__(self, folder: Path, layout: FileLayout) -> None:
        self.layout = layout
        self._path = folder / layout.name
        self._partial = self._path.with_name(self._path.name + PARTIAL_SUFFIX)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._remaining_bytes = layout.size_bytes
        self._fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        os.truncate(self._fd, layout.size_bytes)
        self._write_at(memoryview(layout.header), 0)

    @property
    def is_complete(self) -> bool:
        """Whether every byte has been written."""
        return self._remaining_bytes == 0

    def write(self, parameter_slice: ParameterSlice) -> None:
        """Write rows of a tensor at their offset."""
        tensor = parameter_slice.tensor.detach().contiguous()
        row_bytes = tensor[0].nbytes if tensor.dim() else 0
        offset = self.layout.offsets[parameter_slice.target] + parameter_slice.first_row * row_bytes
        self._write_at(tensor.reshape(-1).view(torch.uint8).numpy().data, offset)

    def finish(self) -> FileEntry:
        """Sync the complete file, rename it to its final name, and return its size and digest."""
        os.fsync(self._fd)
        self.close()
        digest = sha256_of_file(self._partial)  # read back, usually from the page cache
        self._partial.rename(self._path)
        fsync_folder(self._path.parent)
        return FileEntry(self.layout.size_bytes, digest)

    def close(self) -> None:
        """Close the file; harmless if it is closed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write_at(self, data: memoryview, offset: int) -> None:
        self._remaining_bytes -= data.nbytes
        while data.nbytes:
            count = os.pwrite(self._fd, data, offset)
            data, offset = data[count:], offset + count


class StoreWriter:
    """Writes slices of parameters to the files of a store; slices of other parameters are ignored.

    Args:
        folder: the store's folder.
        layouts: the files to write.
        on_file_finished: called with the name and entry of each complete file.
        on_bytes_written: called with the number of bytes of each write.
    """

    def __init__(
        self,
        folder: Path,
        layouts: Iterable[FileLayout],
        *,
        on_file_finished: Callable[[str, FileEntry], None],
        on_bytes_written: Callable[[int], None],
    ) -> None:
        self._folder = folder
        self._layout_by_tensor = {name: layout for layout in layouts for name in layout.offsets}
        self._open_files: dict[str, PartialStoreFile] = {}
        self._on_file_finished = on_file_finished
        self._on_bytes_written = on_bytes_written

    def write(self, parameter_slice: ParameterSlice) -> None:
        """Write a slice, and finish its file if that completes it."""
        layout = self._layout_by_tensor.get(parameter_slice.target)
        if layout is None:
            return
        file = self._open_files.get(layout.name)
        if file is None:
            file = self._open_files[layout.name] = PartialStoreFile(self._folder, layout)
            self._on_bytes_written(len(layout.header))
        file.write(parameter_slice)
        self._on_bytes_written(parameter_slice.tensor.nbytes)
        if file.is_complete:
            self._on_file_finished(layout.name, file.finish())
            del self._open_files[layout.name]

    def contains(self, name: str) -> bool:
        """Return whether a parameter belongs to one of the files."""
        return name in self._layout_by_tensor

    def close(self) -> None:
        """Close the incomplete files; they stay on disk under their partial names."""
        for file in self._open_files.values():
            file.close()
        self._open_files.clear()


def write_partial_first(path: Path, data: bytes) -> None:
    """Write a file atomically, by way of the `.partial` file that the folder's checks expect."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data, temp_path=path.with_name(path.name + PARTIAL_SUFFIX))


@contextmanager
def lock_store_folder(path: Path) -> Iterator[StoreFolder]:
    """Lock a store's folder for one preparation, creating it if it is missing.

    Raises:
        PrepareError: another process holds the lock, or the folder cannot be created.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        fd = os.open(path / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise PrepareError(f"store: {path} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield StoreFolder(path)
    except BlockingIOError:
        raise PrepareError(f"store: {path} is being prepared by another process") from None
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class StoreFolder:
    """The folder of a store; lock it with `lock_store_folder` before changing it.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def is_complete(self) -> bool:
        """Whether the folder has a manifest."""
        return (self.path / MANIFEST_NAME).exists()

    def fingerprint(self) -> str:
        """Return the fingerprint of a complete store's checkpoint; "unknown" if unreadable."""
        try:
            return str(json.loads((self.path / _FINGERPRINT_NAME).read_text())["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError):
            return "unknown"

    def start_or_resume(
        self, fingerprint: str
    ) -> tuple[dict[str, FileEntry], dict[str, tuple[float, float]]]:
        """Start or resume the preparation of a checkpoint.

        Args:
            fingerprint: the checkpoint's; the files of another checkpoint are removed.

        Returns:
            The finished files, after checking each one's size and digest, and the losses of the
            quantised parameters in them, as given to `record_finished`.

        Raises:
            PrepareError: the folder contains files that no preparation created.
        """
        journal = _read_journal(self.path / _JOURNAL_NAME)
        if not journal or journal[0].get("fingerprint") != fingerprint:
            self.clear()
            journal_head = json.dumps({"fingerprint": fingerprint}) + "\n"
            write_partial_first(self.path / _JOURNAL_NAME, journal_head.encode())
            return {}, {}
        self._reject_foreign_files()
        shutil.rmtree(self.path / SHARED_FOLDER, ignore_errors=True)  # shared last, and again
        finished_files: dict[str, FileEntry] = {}
        losses: dict[str, tuple[float, float]] = {}
        for line in journal[1:]:
            if "file" not in line:
                continue
            name, entry = str(line["file"]), FileEntry.from_json(line["entry"], path="journal")
            if self._is_intact(name, entry):
                finished_files[name] = entry
                losses |= _parse_losses(line.get("losses"))
        return finished_files, losses

    def record_finished(
        self,
        name: str,
        entry: FileEntry,
        losses: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        """Record a finished file in the journal.

        Args:
            name: name of the file in the store.
            entry: its size and digest.
            losses: squared error and squared norm of each quantised parameter in it.
        """
        line = {"file": name, "entry": entry.to_json(), "losses": losses or {}}
        self._append_to_journal(line, is_durable=True)

    def digest_record(self) -> JournalledDigests:
        """Return the digests in the journal of a started preparation."""
        journal = _read_journal(self.path / _JOURNAL_NAME)
        known = {str(line["block"]): str(line["digest"]) for line in journal if "block" in line}
        return JournalledDigests(known, self._append_to_journal)

    def _append_to_journal(self, line: Mapping[str, object], *, is_durable: bool) -> None:
        with (self.path / _JOURNAL_NAME).open("a") as file:
            # The leading newline ends a line that an interruption may have truncated.
            file.write(f"\n{json.dumps(line)}\n")
            if is_durable:
                file.flush()
                os.fsync(file.fileno())

    def write_file(self, name: str, content: bytes) -> FileEntry:
        """Write a small file atomically; return its size and digest."""
        write_partial_first(self.path / name, content)
        return FileEntry(len(content), hashlib.sha256(content).hexdigest())

    def commit(self, manifest: Manifest, fingerprint: str) -> None:
        """Write the manifest, which completes the store, and remove the journal."""
        write_partial_first(
            self.path / _FINGERPRINT_NAME, json.dumps({"fingerprint": fingerprint}).encode()
        )
        text = json.dumps(manifest.to_json(), indent=1) + "\n"
        write_partial_first(self.path / MANIFEST_NAME, text.encode())
        (self.path / _JOURNAL_NAME).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what preparations created; the manifest first, so that no broken store remains.

        Raises:
            PrepareError: the folder contains files that no preparation created; nothing is removed.
        """
        self._reject_foreign_files()
        for name in (MANIFEST_NAME, _FINGERPRINT_NAME, _JOURNAL_NAME):
            (self.path / name).unlink(missing_ok=True)
        fsync_folder(self.path)
        for name in _STORE_FOLDERS:
            if (self.path / name).exists():
                shutil.rmtree(self.path / name)

    def _is_intact(self, name: str, entry: FileEntry) -> bool:
        path = self.path / name
        try:
            return path.stat().st_size == entry.size_bytes and sha256_of_file(path) == entry.sha256
        except (OSError, StoreError):
            return False

    def _is_store(self) -> bool:
        """Return whether the folder is a store, even a damaged one.

        A file called manifest.json is not enough: it may belong to something else.
        """
        if (self.path / _FINGERPRINT_NAME).exists():
            return True
        try:
            manifest = json.loads((self.path / MANIFEST_NAME).read_bytes())
        except (OSError, ValueError):
            return False
        return isinstance(manifest, dict) and manifest.get("format") == STORE_FORMAT

    def _reject_foreign_files(self) -> None:
        """Raise StoreMismatch if the folder contains anything that no preparation created."""
        known = {
            _LOCK_NAME,
            _JOURNAL_NAME,
            _FINGERPRINT_NAME,
            f"{_JOURNAL_NAME}.partial",
            *_IGNORED_ENTRIES,
        }
        if (self.path / _JOURNAL_NAME).exists() or self._is_store():
            known |= {
                MANIFEST_NAME,
                f"{MANIFEST_NAME}.partial",
                f"{_FINGERPRINT_NAME}.partial",
                *_STORE_FOLDERS,
            }
        foreign = sorted(set(os.listdir(self.path)) - known)
        if foreign:
            raise StoreMismatch(
                f"store: got {self.path} with {', '.join(foreign[:5])} in it, "
                "expected an empty folder or a store"
            )


@dataclass(frozen=True, slots=True)
class JournalledDigests:
    """Digests of what a store refers to, kept until the preparation is complete.

    Attributes:
        known: the digests by the block's key.
        append: appends a line to the journal; a digest that a crash of the machine loses is
            computed again.
    """

    known: dict[str, str]
    append: Callable[..., None]

    def get(self, key: str, /) -> str | None:
        """Return the digest of a block; None if it is not known."""
        return self.known.get(key)

    def add(self, key: str, digest: str, /) -> None:
        """Record a digest."""
        self.known[key] = digest
        self.append({"block": key, "digest": digest}, is_durable=False)


def _parse_losses(value: object) -> dict[str, tuple[float, float]]:
    """Return the losses of one line of the journal; one of an earlier version has none."""
    losses = value if isinstance(value, dict) else {}
    return {str(name): (float(error), float(norm)) for name, (error, norm) in losses.items()}


def _read_journal(path: Path) -> list[dict[str, object]]:
    """Return the journal's lines, without those that an interruption truncated."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    lines = []
    for line in filter(None, text.splitlines()):
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
