"""A router whose tensors lie in a checkpoint notices when that changes, and never ends by it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from sandbox_processes import PreparedStore, block_specs

from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable
from faasmoe_contracts.store import Store
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.engine.batch_sampler import BatchSampler
from faasmoe_router.errors import RouterWeightsChanged
from faasmoe_router.model_loader import ModelLoadError, load_router_model
from faasmoe_router.referenced_tensors import check_weights

NAME = "model.embed_tokens.weight"


@pytest.fixture
def store(prepared_store: PreparedStore, tmp_path: Path) -> Store:
    """A copy of a store and of the checkpoint that it refers to."""
    prepared = prepared_store("mixtral", mode="reference")
    shutil.copytree(prepared.path.parent, tmp_path / "model")
    return Store.open(tmp_path / "model" / prepared.path.name)


def load(store: Store, dtype: torch.dtype | None = None) -> Any:
    entries = tuple(FunctionEndpoints(spec) for spec in block_specs(store, 8))
    dispatcher = Dispatcher(store, RoutingTable(store.manifest.digest, 0, entries))
    return load_router_model(store, dispatcher, device=torch.device("cpu"), dtype=dtype)


def file_of(store: Store) -> tuple[Path, int]:
    """The file of the embeddings, and their offset in it."""
    mapped = store.map_router_references()
    return mapped.files[0].path, mapped.tensors[NAME].offset


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        byte = os.pread(file.fileno(), 1, offset)[0]
        os.pwrite(file.fileno(), bytes([byte ^ 1]), offset)


def test_changed_bytes_are_refused_at_load_and_while_served(store: Store) -> None:
    model, (path, offset) = load(store), file_of(store)
    check_weights(model)
    flip(path, offset)
    message = rf"model\.safetensors: {NAME}: got digest \w+, expected \w+: the checkpoint changed"
    with pytest.raises(RouterWeightsChanged, match=message):
        check_weights(model)
    for dtype in (None, torch.bfloat16):
        with pytest.raises(ModelLoadError, match=message):
            load(store, dtype)
    flip(path, offset)
    check_weights(load(store))


def test_other_times_with_the_same_bytes_are_accepted(store: Store) -> None:
    model, (path, _) = load(store), file_of(store)
    os.utime(path, ns=(1, 1))
    check_weights(model)


def test_a_replaced_or_removed_file_changes_nothing_that_is_served(store: Store) -> None:
    model, (path, _) = load(store), file_of(store)
    other = path.with_name("other")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)
    check_weights(model)
    path.unlink()
    check_weights(model)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: cannot be read: No such file"):
        load(store)


def test_a_truncated_file_is_an_error_and_no_signal(store: Store) -> None:
    model, (path, _) = load(store), file_of(store)
    size = path.stat().st_size
    os.truncate(path, 0)
    for _ in range(2):
        with pytest.raises(RouterWeightsChanged, match=r"model\.safetensors"):
            check_weights(model)
    with pytest.raises(ModelLoadError, match=rf"size: got 0 bytes, expected {size}"):
        load(store)


def test_sampler_takes_no_tokens_of_changed_weights(store: Store) -> None:
    model, (path, offset) = load(store), file_of(store)
    sampler = BatchSampler(lambda *_: None, check_weights=lambda: check_weights(model))
    sampler.plan_batch([], [])
    scores = torch.zeros(1, 4)  # [N, V]
    assert torch.equal(sampler.sample(scores), scores)
    flip(path, offset)
    with pytest.raises(RouterWeightsChanged):
        sampler.sample(scores)
