"""Stores of every model family that implements transformers' experts interface."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families.registry import FAMILIES, Family, experts_modules

from faasmoe_contracts.store import Store
from faasmoe_router.checkpoint.prepare import prepare

StoredTensors = Callable[[Store], dict[str, torch.Tensor]]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_store_equals_from_pretrained(
    tmp_path: Path, stored_tensors: StoredTensors, family: Family
) -> None:
    model = family.build()
    model.save_pretrained(tmp_path / "checkpoint")
    store = prepare(str(tmp_path / "checkpoint"), tmp_path / "store")
    expected = type(model).from_pretrained(tmp_path / "checkpoint").state_dict()
    got = stored_tensors(store)
    assert set(expected) - set(model.all_tied_weights_keys) <= set(got) <= set(expected)
    for name, tensor in got.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name
    assert [layer.name for layer in store.manifest.layers] == list(experts_modules(model))
    for layer in store.manifest.layers:
        store.map_layer(layer.index)
