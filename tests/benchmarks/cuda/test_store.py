"""A deep store, generated from a single layer, is a valid store."""

from pathlib import Path

import pytest
import torch
from benchmarks.cuda.store import make_deep_store
from benchmarks.geometry import CheckpointGeometry
from benchmarks.transformers_worker import load_full_model

from faasmoe_contracts.store import Store
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.model_loader import load_router_model

GEOMETRY = CheckpointGeometry(3, 256, 64, 4, 4, 2, 32, 64)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder: Path = tmp_path_factory.mktemp("deep")
    path = make_deep_store(GEOMETRY, folder)
    assert make_deep_store(GEOMETRY, folder) == path
    return Store.open(path)


def test_files_match_manifest_and_layers_share_a_file(store: Store) -> None:
    store.verify()
    assert store.manifest.model.num_hidden_layers == len(store.manifest.layers) == 3
    inodes = {(store.path / layer.file).stat().st_ino for layer in store.manifest.layers}
    assert len(inodes) == 1


def test_router_and_functions_equal_the_whole_model(store: Store) -> None:
    whole = load_full_model(store, torch.device("cpu"))
    dispatcher = Dispatcher(store, None)  # no sandboxes: computes all functions locally
    ours = load_router_model(store, dispatcher, device=torch.device("cpu"))
    ids = torch.arange(12)[None]  # [1, S]
    with torch.no_grad():
        expected, got = whole(ids).logits, ours(ids).logits  # [1, S, V]
    dispatcher.close()
    error = (got.float() - expected.float()).abs().max() / expected.float().abs().max()
    assert error <= 2**-5  # bfloat16, three layers
    assert not any(parameter.is_meta for parameter in whole.parameters())
