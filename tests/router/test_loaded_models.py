"""Models that a zygote loads for the routers of models with equal tensors."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from sandbox_processes import PreparedStore, block_specs

from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable
from faasmoe_contracts.store import Store
from faasmoe_expert.functions.verification import VerifiedBlocks
from faasmoe_router import model_loader
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.errors import RouterWeightsChanged
from faasmoe_router.loaded_models import LoadedModel, LoadedModelCache
from faasmoe_router.model_loader import ModelLoadError, load_router_model, prepare_model
from faasmoe_router.referenced_tensors import check_weights

NAME = "model.embed_tokens.weight"
CPU = torch.device("cpu")


@pytest.fixture
def store(prepared_store: PreparedStore, tmp_path: Path) -> Store:
    """A copy of a store and of the checkpoint that it refers to."""
    prepared = prepared_store("mixtral", mode="reference")
    shutil.copytree(prepared.path.parent, tmp_path / "model")
    return Store.open(tmp_path / "model" / prepared.path.name)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> LoadedModelCache:
    cache = LoadedModelCache()
    monkeypatch.setattr(model_loader, "LOADED_MODELS", cache)
    return cache


def dispatcher_of(store: Store) -> Dispatcher:
    entries = tuple(FunctionEndpoints(spec) for spec in block_specs(store, 8))
    return Dispatcher(store, RoutingTable(store.manifest.digest, 0, entries))


def load(store: Store) -> Any:
    return load_router_model(store, dispatcher_of(store), device=CPU, dtype=torch.float32)


def prepare(store: Store, user: str) -> None:
    prepare_model(store, torch.float32, user=user)


def has_loaded(
    cache: LoadedModelCache, store: Store, *, dtype: torch.dtype = torch.float32
) -> bool:
    return cache.take(store, dtype, "auto") is not None


def tensors_of(store: Store) -> tuple[Path, int]:
    """The file of the embeddings, and their offset in it."""
    mapped = store.map_router_references()
    return mapped.files[0].path, mapped.tensors[NAME].offset


def scores(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(torch.tensor([[1, 2, 3]])).logits
    return output


def test_the_second_model_with_equal_tensors_is_loaded_and_taken_once(
    cache: LoadedModelCache, store: Store
) -> None:
    for _ in range(3):  # one that starts again and again shares with nobody
        prepare(store, "a")
    assert not has_loaded(cache, store)
    prepare(store, "b")
    assert not has_loaded(cache, store, dtype=torch.bfloat16)
    assert has_loaded(cache, store)
    assert not has_loaded(cache, store)


def test_a_zygote_loads_without_starting_threads(
    cache: LoadedModelCache, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise AssertionError(f"{thread} was started: its process must not fork any more")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for user in "ab":
        prepare_model(store, torch.float32, user=user, verified_blocks=VerifiedBlocks(None))
    assert has_loaded(cache, store)


def test_another_store_with_the_same_files_takes_it_and_computes_the_same(
    cache: LoadedModelCache, store: Store
) -> None:
    expected = scores(load(store))
    variant = Store.open(Path(shutil.copytree(store.path, store.path.with_name("variant"))))
    prepare(store, "a")
    prepare(variant, "b")
    model = load(variant)
    assert not has_loaded(cache, variant)  # it was taken
    assert torch.equal(scores(model), expected)
    check_weights(model)


def test_files_that_changed_are_loaded_anew(cache: LoadedModelCache, store: Store) -> None:
    for user in "ab":
        prepare(store, user)
    path, offset = tensors_of(store)
    with path.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), offset)
    assert not has_loaded(cache, store)
    with pytest.raises(ModelLoadError, match=f"{NAME}: got digest"):
        load(store)


def test_a_taken_model_watches_its_files(cache: LoadedModelCache, store: Store) -> None:
    for user in "ab":
        prepare(store, user)
    model, (path, _) = load(store), tensors_of(store)
    os.truncate(path, 0)
    with pytest.raises(RouterWeightsChanged, match=r"model\.safetensors"):
        check_weights(model)
    with pytest.raises(ModelLoadError, match="size: got 0 bytes"):
        load(store)


def test_a_store_with_tensors_of_its_own_is_never_loaded(
    cache: LoadedModelCache, prepared_store: PreparedStore
) -> None:
    store = prepared_store("mixtral")
    for user in "ab":
        prepare(store, user)
    assert not has_loaded(cache, store)


def test_only_those_used_last_are_kept(store: Store) -> None:
    cache, loads = LoadedModelCache(size=1), []

    def load_anew() -> LoadedModel:
        loads.append(torch.get_num_threads())
        return LoadedModel(torch.nn.Module(), None)

    n_threads = torch.get_num_threads()
    for user, dtype in (("a", torch.float32), ("b", torch.float32), ("a", torch.bfloat16)):
        cache.prepare(store, dtype, "auto", user=user, load=load_anew)
    assert loads == [1]
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        assert cache.prepare(store, dtype, "auto", user="b", load=load_anew)
    assert loads == [1, 1, 1]
    assert torch.get_num_threads() == n_threads
