import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faasmoe_contracts.store import Store, StoreError, manifest_digest
from faasmoe_contracts.store.reader import ManifestCache

LAYER = "experts/00001.safetensors"


def test_opens_a_complete_store(store_path: Path) -> None:
    store = Store.open(str(store_path))
    store.verify()
    assert len(store.manifest.layers) == 2
    assert store.router_files() == [store_path / "router/model-00001-of-00001.safetensors"]


def test_parses_equal_manifests_once(store_path: Path, tmp_path: Path) -> None:
    other = shutil.copytree(store_path, tmp_path / "copy")
    first = Store.open(store_path)
    assert Store.open(store_path).manifest is first.manifest
    assert Store.open(other).manifest is first.manifest
    assert Store.open(other).path == other


def test_reads_a_manifest_that_has_changed(store_path: Path) -> None:
    before = Store.open(store_path).manifest
    value = before.to_json()
    value["model"]["source"] = "org/other"
    value["digest"] = manifest_digest(value)
    (store_path / "manifest.json").write_text(json.dumps(value))
    assert Store.open(store_path).manifest.model.source == "org/other"
    (store_path / "manifest.json").write_text("{")
    with pytest.raises(StoreError, match=r"manifest\.json: invalid JSON"):
        Store.open(store_path)


def test_checks_the_files_of_a_store_whose_manifest_is_known(store_path: Path) -> None:
    Store.open(store_path)
    (store_path / LAYER).unlink()
    with pytest.raises(StoreError, match="cannot be read: No such file"):
        Store.open(store_path)


def test_keeps_the_manifests_that_were_used_last(store_path: Path, tmp_path: Path) -> None:
    cache, folders = ManifestCache(size=2), []
    for name in ("a", "b", "c"):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        value = Store.open(store_path).manifest.to_json()
        value["model"]["source"] = name
        value["digest"] = manifest_digest(value)
        (folders[-1] / "manifest.json").write_text(json.dumps(value))
    first, second = cache.read(folders[0]), cache.read(folders[1])
    assert cache.read(folders[0]) is first
    cache.read(folders[2])
    assert cache.read(folders[0]) is first
    assert cache.read(folders[1]) is not second
    assert cache.read(folders[1]) == second


def test_rejects_a_directory_without_manifest(store_path: Path) -> None:
    (store_path / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"manifest\.json: not found"):
        Store.open(store_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", "[" * 100_000], ids=range(5))
def test_names_the_file_of_an_invalid_manifest(store_path: Path, text: str) -> None:
    (store_path / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=r"manifest\.json"):
        Store.open(store_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda path: path.unlink(), "cannot be read: No such file", id="missing"),
        pytest.param(
            lambda path: path.write_bytes(path.read_bytes()[:-1]), "size: got", id="truncated"
        ),
        pytest.param(lambda path: path.write_bytes(b""), "size: got 0 bytes", id="empty"),
    ],
)
def test_names_a_missing_or_mis_sized_file(
    store_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    store = Store.open(store_path)
    damage(store_path / LAYER)
    for action in (lambda: Store.open(store_path), lambda: store.map_layer(1), store.verify):
        with pytest.raises(StoreError, match=message) as caught:
            action()
        assert LAYER in str(caught.value)


def test_verify_names_the_corrupted_file(store_path: Path) -> None:
    content = bytearray((store_path / LAYER).read_bytes())
    content[-1] ^= 1
    (store_path / LAYER).write_bytes(content)
    store = Store.open(store_path)
    with pytest.raises(StoreError, match=r"00001\.safetensors: sha256: got"):
        store.verify()
    store.verify(["experts/00000.safetensors"])


def test_verify_rejects_a_file_outside_the_manifest(store_path: Path) -> None:
    with pytest.raises(StoreError, match="got the file 'router/x'"):
        Store.open(store_path).verify(["router/x"])


@pytest.mark.parametrize("index", [-1, 2])
def test_rejects_a_layer_index_out_of_range(store_path: Path, index: int) -> None:
    with pytest.raises(StoreError, match=f"layer: got {index}, expected 0 to 1"):
        Store.open(store_path).map_layer(index)


@pytest.mark.parametrize(("field", "value"), [("expert_bytes", 40), ("shared_bytes", 4)])
def test_rejects_a_layer_whose_size_differs_from_the_manifest(
    store_path: Path, manifest: dict[str, Any], field: str, value: int
) -> None:
    manifest["layers"][1][field] = value
    manifest["digest"] = manifest_digest(manifest)
    (store_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"00001\.safetensors: \w+ tensors: got \d+ bytes"):
        Store.open(store_path).map_layer(1)


def test_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, faasmoe_contracts.store; print({'torch', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
