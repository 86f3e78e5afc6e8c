"""The stores whose files a preparation may share, and what they hold."""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

from faasmoe_contracts.store import MANIFEST_NAME, Store, StoreError
from faasmoe_router.checkpoint.sharing.parts import Part, layer_parts, router_parts
from faasmoe_router.errors import SourceUnsupported

logger = logging.getLogger(__name__)


def find_stores(paths: Iterable[Path], *, without: Path) -> list[Store]:
    """Return the complete stores that paths name.

    Args:
        paths: stores, or folders of stores; in a folder, what cannot be used is left out.
        without: the store that is being prepared.

    Raises:
        SourceUnsupported: a path is neither a store nor a folder.
        StoreError: a path is a store that cannot be used.
    """
    stores: dict[Path, Store] = {}
    for path in (Path(os.path.realpath(path)) for path in paths):
        if (path / MANIFEST_NAME).exists():
            found = [Store.open(path)]
        elif path.is_dir():
            found = _stores_in(path)
        else:
            raise SourceUnsupported(
                f"share-with: got {path}, expected a store or a folder of stores"
            )
        for store in found:
            stores[Path(os.path.realpath(store.path))] = store
    stores.pop(Path(os.path.realpath(without)), None)
    return list(stores.values())


def _stores_in(folder: Path) -> list[Store]:
    stores = []
    for path in sorted(folder.iterdir()):
        if not (path / MANIFEST_NAME).is_file():
            continue
        try:
            stores.append(Store.open(path))
        except StoreError as error:
            logger.warning("%s is not shared with: %s", path, error)
    return stores


def parts_by_key(stores: Sequence[Store]) -> dict[Hashable, list[Part]]:
    """Return all that stores hold, by the key of equal parts."""
    found: dict[Hashable, list[Part]] = {}
    for store in stores:
        try:
            parts = [part for _, _, part in router_parts(store)]
            for layer in store.manifest.layers:
                parts += layer_parts(layer, store.map_layer(layer.index))
        except StoreError as error:  # it was removed or changed meanwhile
            logger.warning("%s is not shared with: %s", store.path, error)
            continue
        for part in parts:
            found.setdefault(part.key, []).append(part)
    return found
