"""Opened stores are kept while their manifests stay as they are."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from sandbox_processes import PreparedStore

from faasmoe_contracts.store import MANIFEST_NAME, StoreError
from faasmoe_router.opened_stores import OpenedStores


@pytest.fixture
def folder(prepared_store: PreparedStore, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared_store("qwen2_moe").path, tmp_path / "store"))


def test_a_manifest_is_read_once(folder: Path) -> None:
    stores = OpenedStores()
    assert stores.get(folder) is stores.get(folder)


def test_a_manifest_that_was_replaced_is_read_again(folder: Path) -> None:
    stores = OpenedStores()
    first = stores.get(folder)
    copy = folder / "copy"
    shutil.copy(folder / MANIFEST_NAME, copy)
    os.replace(copy, folder / MANIFEST_NAME)
    second = stores.get(folder)
    assert second is not first
    assert second.manifest.digest == first.manifest.digest


def test_missing_files_are_noticed_of_a_store_that_is_kept(folder: Path) -> None:
    stores = OpenedStores()
    name = next(iter(stores.get(folder).manifest.files))
    (folder / name).unlink()
    with pytest.raises(StoreError, match=name):
        stores.get(folder)
    shutil.rmtree(folder)
    with pytest.raises(StoreError):
        stores.get(folder)


def test_the_store_that_was_used_least_recently_goes(folder: Path, tmp_path: Path) -> None:
    others = [Path(shutil.copytree(folder, tmp_path / str(n))) for n in range(2)]
    stores = OpenedStores(size=2)
    kept = stores.get(folder)
    gone = stores.get(others[0])
    assert stores.get(folder) is kept
    stores.get(others[1])
    assert stores.get(folder) is kept
    assert stores.get(others[0]) is not gone
