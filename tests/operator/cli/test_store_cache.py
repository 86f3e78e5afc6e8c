import os
from pathlib import Path

import pytest

from faasmoe_contracts.store import QuantizationEntry
from faasmoe_operator.cli.model_source import ModelSource
from faasmoe_operator.cli.store_cache import CachedStore, stores_folder
from faasmoe_operator.errors import CommandError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x")
    return folder


def cached_store(
    model: Path | str,
    revision: str | None = None,
    dtype: str | None = None,
    experts: str = "none",
    router: str = "none",
) -> CachedStore:
    return CachedStore.of(
        ModelSource.parse(str(model)),
        revision=revision,
        dtype=dtype,
        quantization=QuantizationEntry(experts, router),
    )


def prepared(store: CachedStore) -> CachedStore:
    stamp = store.stamp()
    store.path.mkdir(parents=True)
    (store.path / "manifest.json").write_text("{}")
    store.write_stamp(stamp)
    return store


def test_each_checkpoint_and_setting_has_a_folder_of_its_own(cache: Path, checkpoint: Path) -> None:
    stores = [
        cached_store(checkpoint),
        cached_store("org/checkpoint"),
        cached_store("org/checkpoint", revision="v2"),
        cached_store(checkpoint, dtype="float32"),
        cached_store(checkpoint, experts="int8"),
        cached_store(checkpoint, router="int8"),
    ]
    names = {store.path.name for store in stores}
    assert len(names) == len(stores)
    assert all(name.startswith("checkpoint-") for name in names)
    assert {store.path.parent for store in stores} == {cache / "faasmoe" / "stores"}
    assert cached_store(f"{checkpoint}/").path == cached_store(checkpoint).path


@pytest.mark.parametrize("value", ["", "relative/cache"])
def test_without_a_valid_variable_the_cache_is_in_the_home_folder(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert stores_folder() == Path.home() / ".cache" / "faasmoe" / "stores"


def test_a_store_is_current_until_its_checkpoint_changes(checkpoint: Path) -> None:
    store = cached_store(checkpoint)
    assert not store.is_current
    assert prepared(store).is_current
    assert not store.is_outdated
    (checkpoint / "config.json").write_text('{"changed": 1}')
    assert store.is_outdated
    assert not store.is_current


@pytest.mark.parametrize("change", ["rewritten", "added", "removed"])
def test_weights_that_change_make_a_store_outdated(checkpoint: Path, change: str) -> None:
    store = prepared(cached_store(checkpoint))
    weights = checkpoint / "model.safetensors"
    if change == "rewritten":  # with the same size
        os.utime(weights, ns=(0, 0))
    elif change == "added":
        (checkpoint / "more.safetensors").write_bytes(b"")
    else:
        weights.unlink()
    assert store.is_outdated


def test_an_interrupted_preparation_is_neither_current_nor_outdated(checkpoint: Path) -> None:
    store = cached_store(checkpoint)
    store.path.mkdir(parents=True)
    (store.path / "manifest.json").write_text("{}")  # complete, but ended before its stamp
    assert not store.is_current
    assert not store.is_outdated


def test_a_gguf_file_is_its_own_stamp(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")
    store = prepared(cached_store(file))
    (tmp_path / "beside").write_text("")
    assert store.is_current
    file.write_bytes(b"GGUF2")
    assert store.is_outdated


def test_a_hub_model_is_current_once_it_is_prepared() -> None:
    store = cached_store("org/name")
    assert not store.is_current
    assert prepared(store).is_current


def test_a_cache_that_cannot_be_made_is_named(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CommandError, match="file/faasmoe/stores: cannot be created: Not a dir"):
        cached_store(checkpoint).make_parent()
