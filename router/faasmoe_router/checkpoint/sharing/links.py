"""Hard links below a store's folder of the files that it shares with other stores."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from pathlib import Path

from faasmoe_contracts.atomic_file import fsync_folder
from faasmoe_contracts.store.referenced_files import SHARED_FOLDER, CheckpointFile, FilePlace
from faasmoe_router.checkpoint.sharing.equality import FileIds

logger = logging.getLogger(__name__)


class SharedLinks:
    """Makes hard links in a store; what was linked stays if the other store is removed.

    Args:
        store: the store's folder, without links.
        ids: identities of the files that are linked, as they were compared.
    """

    def __init__(self, store: Path, ids: FileIds) -> None:
        self._store = Path(os.path.realpath(store))
        self._ids = ids
        self._links: dict[tuple[int, int], CheckpointFile | None] = {}

    @property
    def _folder(self) -> Path:
        return self._store / SHARED_FOLDER

    def link(self, path: Path) -> CheckpointFile | None:
        """Return the link of a file; None if it cannot be linked, which is logged once."""
        file_id = self._ids[path]
        if file_id not in self._links:
            self._links[file_id] = self._make(path, file_id)
        return self._links[file_id]

    def keep(self, used: Collection[CheckpointFile]) -> None:
        """Remove the links that are not used, and make the others durable."""
        for link in self._links.values():
            if link is not None and link not in used:
                (self._store / link.name).unlink()
        if used:
            fsync_folder(self._folder)
            fsync_folder(self._store)
        elif self._folder.exists():
            self._folder.rmdir()

    def _make(self, path: Path, file_id: tuple[int, int]) -> CheckpointFile | None:
        name = f"{SHARED_FOLDER}/{len(self._links):05}{path.suffix}"
        target = self._store / name
        target.parent.mkdir(exist_ok=True)
        try:
            os.link(path, target, follow_symlinks=False)
        except OSError as error:  # another file system, no right to, or too many links
            logger.warning("%s is not shared: no hard link of it: %s", path, error.strerror)
            return None
        status = target.lstat()
        if (status.st_dev, status.st_ino) != file_id:
            target.unlink()
            logger.warning("%s is not shared: it was replaced meanwhile", path)
            return None
        return CheckpointFile(name, status.st_size, FilePlace.SHARED, str(path))
