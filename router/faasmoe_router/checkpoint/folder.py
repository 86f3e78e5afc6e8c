"""The store's folder while it is prepared: one preparation at a time, resumable.

A journal names the files that are finished, with their digests, and the checkpoint that they were
made of; it goes when the manifest has come.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from faasmoe_expert.store import (
    FORMAT,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    StoreError,
    sha256_of_file,
)
from faasmoe_router.checkpoint.errors import PrepareError, StoreMismatch
from faasmoe_router.checkpoint.writer import sync_folder, write_durably

_LOCK, _JOURNAL, _ORIGIN = ".lock", ".journal", ".origin.json"
_PARTS = ("experts", "router", "model")
_FOREIGN = ("lost+found",)  # of a freshly made volume


@dataclass(frozen=True, slots=True)
class StoreFolder:
    """A folder that this process alone prepares; see `locked`."""

    path: Path

    @property
    def is_complete(self) -> bool:
        """Tell whether a manifest is there."""
        return (self.path / MANIFEST_NAME).exists()

    def origin(self) -> str:
        """Return the fingerprint of the checkpoint that the complete store was made of."""
        try:
            return str(json.loads((self.path / _ORIGIN).read_text())["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError):
            return "unknown"

    def begin(self, fingerprint: str) -> dict[str, FileEntry]:
        """Start, or go on with, the preparation of a checkpoint; return the finished files."""
        journal = _read_journal(self.path / _JOURNAL)
        if not journal or journal[0].get("fingerprint") != fingerprint:
            self.clear()
            head = json.dumps({"fingerprint": fingerprint}) + "\n"
            write_durably(self.path / _JOURNAL, head.encode())
            return {}
        self._refuse_foreign()
        finished: dict[str, FileEntry] = {}
        for line in journal[1:]:
            name, entry = str(line["file"]), FileEntry.from_json(line["entry"], where="journal")
            if self._holds(name, entry):
                finished[name] = entry
        return finished

    def record(self, name: str, entry: FileEntry) -> None:
        """Note in the journal that a file is finished."""
        line = json.dumps({"file": name, "entry": entry.to_json()})
        with (self.path / _JOURNAL).open("a") as file:
            # The newline first: a line that an interruption cut short must not swallow this one.
            file.write(f"\n{line}\n")
            file.flush()
            os.fsync(file.fileno())

    def put(self, name: str, content: bytes) -> FileEntry:
        """Write a small file whole."""
        write_durably(self.path / name, content)
        return FileEntry(len(content), hashlib.sha256(content).hexdigest())

    def complete(self, manifest: Manifest, fingerprint: str) -> None:
        """Write the manifest, which makes the folder a store."""
        write_durably(self.path / _ORIGIN, json.dumps({"fingerprint": fingerprint}).encode())
        text = json.dumps(manifest.to_json(), indent=1) + "\n"
        write_durably(self.path / MANIFEST_NAME, text.encode())
        (self.path / _JOURNAL).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what preparation made; the manifest goes first.

        Raises:
            PrepareError: the folder holds what no preparation made; nothing is removed.
        """
        self._refuse_foreign()
        for name in (MANIFEST_NAME, _ORIGIN, _JOURNAL):
            (self.path / name).unlink(missing_ok=True)
        sync_folder(self.path)
        for name in _PARTS:
            if (self.path / name).exists():
                shutil.rmtree(self.path / name)

    def _holds(self, name: str, entry: FileEntry) -> bool:
        path = self.path / name
        try:
            return path.stat().st_size == entry.size_bytes and sha256_of_file(path) == entry.sha256
        except (OSError, StoreError):
            return False

    def _is_ours(self) -> bool:
        """Tell a store, damaged or not, from any folder that has a file called manifest.json."""
        if (self.path / _ORIGIN).exists():
            return True
        try:
            manifest = json.loads((self.path / MANIFEST_NAME).read_bytes())
        except (OSError, ValueError):
            return False
        return isinstance(manifest, dict) and manifest.get("format") == FORMAT

    def _refuse_foreign(self) -> None:
        """Refuse a folder with anything in it that an interrupted preparation does not explain."""
        known = {_LOCK, _JOURNAL, _ORIGIN, f"{_JOURNAL}.partial", *_FOREIGN}
        if (self.path / _JOURNAL).exists() or self._is_ours():
            known |= {MANIFEST_NAME, f"{MANIFEST_NAME}.partial", f"{_ORIGIN}.partial", *_PARTS}
        foreign = sorted(set(os.listdir(self.path)) - known)
        if foreign:
            raise StoreMismatch(
                f"store: got {self.path} with {', '.join(foreign[:5])} in it, "
                "expected an empty folder or a store"
            )


@contextmanager
def locked(path: Path) -> Iterator[StoreFolder]:
    """Hold the folder for one preparation; it is made if it is not there.

    Raises:
        PrepareError: another preparation holds it, or it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        fd = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise PrepareError(f"store: {path} cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield StoreFolder(path)
    except BlockingIOError:
        raise PrepareError(f"store: {path} is being prepared by another process") from None
    finally:
        os.close(fd)


def _read_journal(path: Path) -> list[dict[str, object]]:
    """Return the journal's lines; a line that an interruption cut short is not one."""
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
