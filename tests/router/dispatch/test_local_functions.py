"""Local fallback with a store that has disappeared."""

import shutil
from pathlib import Path

import pytest
import torch
from sandbox_processes import PreparedStore, block_specs

from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable
from faasmoe_contracts.store import Store
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.errors import StoreUnreadable


@pytest.mark.parametrize("lost", ["file", "store"])
def test_error_names_a_store_that_disappeared(
    prepared_store: PreparedStore, tmp_path: Path, lost: str
) -> None:
    folder = tmp_path / "store"
    shutil.copytree(prepared_store("mixtral").path, folder)
    store = Store.open(folder)
    layer = store.manifest.layers[0]
    entries = tuple(FunctionEndpoints(spec) for spec in block_specs(store, 4))
    dispatcher = Dispatcher(store, RoutingTable(store.manifest.digest, 0, entries))
    if lost == "store":
        shutil.rmtree(folder)
    else:
        (folder / layer.file).unlink()
    hidden = torch.zeros(1, layer.hidden_size)  # [T, H]
    index, weight = torch.zeros(1, layer.top_k, dtype=torch.long), torch.ones(1, layer.top_k)
    with pytest.raises(
        StoreUnreadable, match=f"the store {folder} cannot serve as fallback: .*experts"
    ):
        dispatcher.compute(0, hidden, index, weight)
