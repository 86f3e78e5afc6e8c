"""Opened stores by folder, so that a router reads no manifest that its zygote has read already.

Reading the demo model's takes 8 ms of a processor, and its objects 2 MB, which a forked router
shares with the zygote.
"""

from __future__ import annotations

import os
from pathlib import Path

from faasmoe_contracts.store import MANIFEST_NAME, Store

MAX_STORES = 16
Identity = tuple[int, int, int, int, int]


class OpenedStores:
    """The stores that were opened last.

    Args:
        size: how many are kept.
    """

    def __init__(self, *, size: int = MAX_STORES) -> None:
        self._size = size
        self._stores: dict[Path, tuple[Identity, Store]] = {}  # the one used last is the last

    def get(self, folder: Path) -> Store:
        """Return the store of a folder, opened anew if its manifest has changed.

        Raises:
            StoreError: there is no complete store, or a file or a field is invalid.
            OSError: the manifest cannot be read.
        """
        identity = _identity(folder / MANIFEST_NAME)
        found = self._stores.pop(folder, None)
        if found is not None and found[0] == identity:
            store = found[1]
            store.check_files()
        else:
            store = Store.open(folder)
        if identity is not None:
            self._stores[folder] = (identity, store)
        while len(self._stores) > self._size:
            del self._stores[next(iter(self._stores))]
        return store


def _identity(path: Path) -> Identity | None:
    """Return what changes with a file's content; None if there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None  # opening the store says what is wrong
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


STORES = OpenedStores()
"""This process's; routers have what their zygote had."""
