"""A preparation that finds its store complete, and need not look at the checkpoint's bytes again.

A Kubernetes Job may run again at any time: after its pod was evicted, or when the operator was
installed anew. The store that it finds is what serves; the hub may be away, its branch have moved.
"""

from __future__ import annotations

import re
from pathlib import Path

from faasmoe_expert.store import MANIFEST_NAME, ModelEntry, Store
from faasmoe_router.checkpoint.errors import StoreMismatch
from faasmoe_router.checkpoint.folder import StoreFolder
from faasmoe_router.checkpoint.source import is_hub, resolve_source

_COMMIT = re.compile(r"[0-9a-f]{40}")  # a branch or tag may have moved, a commit never does


def finished(source: str, store: Path, *, revision: str | None, dtype: str | None) -> Store | None:
    """Return the store if it is complete; None if there is something left to prepare.

    Args:
        source: as in `prepare`.
        store: the store's folder.
        revision: as in `prepare`; a commit must be the store's.
        dtype: as in `prepare`.

    Raises:
        StoreMismatch: the folder holds a complete store of something else.
        PrepareError: the source is a folder that cannot be read.
        StoreError: the store is complete but damaged.
    """
    if not (store / MANIFEST_NAME).exists():
        return None
    held = Store.open(store)
    if is_hub(source):
        _check_hub(held.manifest.model, source, store, revision=revision, dtype=dtype)
        return held
    fingerprint = resolve_source(source, revision=revision).fingerprint(dtype=dtype)
    if StoreFolder(store).origin() != fingerprint:
        _refuse(held.manifest.model, source, store)
    return held


def _check_hub(
    held: ModelEntry, source: str, store: Path, *, revision: str | None, dtype: str | None
) -> None:
    is_same = held.source.removeprefix("hf://") == source.removeprefix("hf://")
    is_other_commit = _COMMIT.fullmatch(revision or "") and revision != held.revision
    if not is_same or is_other_commit or dtype not in (None, held.dtype):
        asked = f"{source!r} (revision {revision}, {dtype or 'its dtype'})"
        _refuse(held, asked, store)


def _refuse(held: ModelEntry, asked: str, store: Path) -> None:
    raise StoreMismatch(
        f"store: got {store}, prepared from {held.source!r} (revision {held.revision}, "
        f"{held.dtype}), expected {asked} as it is now, or an empty folder"
    )
