"""The router computes from verified bytes only, and serves on what is sound."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from sandbox_processes import PreparedStore, block_specs

from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable
from faasmoe_contracts.store import Store
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.errors import StoreCorrupted


def test_a_corrupted_expert_is_named_and_the_others_are_computed(
    prepared_store: PreparedStore, tmp_path: Path
) -> None:
    shutil.copytree(prepared_store("mixtral").path, tmp_path / "store")
    store = Store.open(tmp_path / "store")
    layer = store.manifest.layers[0]
    entries = tuple(FunctionEndpoints(spec) for spec in block_specs(store, 4))
    dispatcher = Dispatcher(store, RoutingTable(store.manifest.digest, 0, entries))
    hidden, weight = torch.ones(1, layer.hidden_size), torch.ones(1, 1)  # [T, H], [T, k]

    def compute(expert: int) -> torch.Tensor:
        return dispatcher.compute(0, hidden, torch.tensor([[expert]]), weight)

    right = [compute(expert) for expert in (0, 7)]
    path = store.path / layer.file
    last = path.stat().st_size - 1  # of the last expert

    def flip() -> None:
        with path.open("r+b") as file:
            byte = os.pread(file.fileno(), 1, last)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 1]), last)

    flip()
    assert torch.equal(compute(0), right[0])
    with pytest.raises(StoreCorrupted, match="expert 7 of "):
        compute(7)
    flip()
    assert torch.equal(compute(7), right[1])
