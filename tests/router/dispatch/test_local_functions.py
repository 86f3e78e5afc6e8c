"""Local fallback: with quantised experts, and with a store that has disappeared."""

import shutil
from pathlib import Path

import pytest
import torch
from families.reference import upcast_model
from families.registry import FAMILIES, experts_modules
from sandbox_processes import PreparedStore, block_specs

from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable
from faasmoe_contracts.store import Store
from faasmoe_router.dispatch import Dispatcher
from faasmoe_router.dispatch.local_functions import LocalFunctions, map_function
from faasmoe_router.errors import StoreUnreadable


@pytest.mark.parametrize("scheme", ["int8", "int4", "mxfp4"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_computes_quantised_experts(prepared_store: PreparedStore, name: str, scheme: str) -> None:
    store = prepared_store(name, experts=scheme)
    layer = store.manifest.layers[0]
    entries = tuple(FunctionEndpoints(spec) for spec in block_specs(store, 3))
    dispatcher = Dispatcher(store, RoutingTable(store.manifest.digest, 0, entries))
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(5, layer.hidden_size, generator=generator)  # [T, H]
    scores = torch.randn(5, layer.num_experts, generator=generator)  # [T, E]
    weight, index = scores.softmax(-1).topk(layer.top_k)  # [T, k] each
    family = next(family for family in FAMILIES if family.name == name)
    (module, *_) = experts_modules(upcast_model(family, store)).values()
    with torch.no_grad():
        expected = module(hidden, index, weight)  # [T, H]
    got = dispatcher.compute(0, hidden, index, weight)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def _mapped_parts(file: Path) -> int:
    """Return how many parts of a file this process maps."""
    return Path("/proc/self/maps").read_text().count(f"{file}\n")


def test_idle_router_maps_nothing_that_it_has_computed(prepared_store: PreparedStore) -> None:
    store = prepared_store("mixtral")
    layer = store.manifest.layers[0]
    entries = tuple(FunctionEndpoints(spec) for spec in block_specs(store, 3))
    dispatcher = Dispatcher(store, RoutingTable(store.manifest.digest, 0, entries))
    hidden = torch.randn(2, layer.hidden_size)  # [T, H]
    index = torch.zeros(2, layer.top_k, dtype=torch.long)  # [T, k]
    weight = torch.ones(2, layer.top_k)  # [T, k]
    before = _mapped_parts(store.path / layer.file)
    output = dispatcher.compute(0, hidden, index, weight)
    assert _mapped_parts(store.path / layer.file) > before
    dispatcher.release_memory()
    assert _mapped_parts(store.path / layer.file) == before
    assert torch.equal(dispatcher.compute(0, hidden, index, weight), output)


def test_function_that_is_mapped_for_something_else_is_shared(
    prepared_store: PreparedStore,
) -> None:
    store = prepared_store("mixtral")
    spec, other = block_specs(store, 3)[:2]
    mapped = {spec: map_function(spec, store)}
    functions = LocalFunctions(store, find=mapped.get)
    assert functions.map(spec) is mapped[spec]
    assert functions.map(other) is functions.map(other)
    assert list(functions.mapped()) == [spec, other]


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
