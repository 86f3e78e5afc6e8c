"""Routing tables are indexed, or refused if they do not fit the store."""

from dataclasses import replace

import pytest
from sandbox_processes import PreparedStore, block_specs

from faasmoe_contracts.routing_table import (
    FunctionEndpoints,
    FunctionSpec,
    RoutingTable,
    RoutingTableError,
)
from faasmoe_contracts.store import Store
from faasmoe_router.dispatch.routing import RoutingIndex


@pytest.fixture(scope="module")
def store(prepared_store: PreparedStore) -> Store:
    """Three layers of 8 experts."""
    return prepared_store("mixtral")


@pytest.fixture(scope="module")
def table(store: Store) -> RoutingTable:
    entries = [
        FunctionEndpoints(spec, (f"10.0.0.{n}:9090",))
        for n, spec in enumerate(block_specs(store, 3))
    ]
    return RoutingTable(store.manifest.digest, 7, tuple(entries))


def test_every_expert_maps_to_its_function(store: Store, table: RoutingTable) -> None:
    routing = RoutingIndex.from_table(table, store)
    assert routing.version == 7
    for index, layer in enumerate(routing.layers):
        for expert, position in enumerate(layer.function_of):
            spec = layer.functions[position].spec
            assert expert in spec.experts
            assert index in spec.layers


def test_function_over_several_layers_is_in_each(store: Store) -> None:
    spec = FunctionSpec("all", (0, 1, 2), tuple(range(8)))
    table = RoutingTable(store.manifest.digest, 0, (FunctionEndpoints(spec, ("h:1", "h:2")),))
    routing = RoutingIndex.from_table(table, store)
    assert [layer.functions[0].spec for layer in routing.layers] == [spec] * 3
    assert routing.addresses() == {"h:1", "h:2"}


def test_table_of_another_model_is_refused(store: Store, table: RoutingTable) -> None:
    with pytest.raises(RoutingTableError, match="model_digest: got sha256:00, expected sha256:"):
        RoutingIndex.from_table(replace(table, model_digest="sha256:00"), store)


def test_table_with_an_uncovered_expert_is_refused(store: Store, table: RoutingTable) -> None:
    without = replace(table, functions=(*table.functions[:1], *table.functions[2:]))
    with pytest.raises(RoutingTableError, match="functions: layer 0 expert 3 is in no function"):
        RoutingIndex.from_table(without, store)


def test_empty_table_is_refused(store: Store) -> None:
    with pytest.raises(RoutingTableError, match="functions: layer 0 expert 0 is in no function"):
        RoutingIndex.from_table(RoutingTable(store.manifest.digest, 0, ()), store)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (FunctionSpec("f", (3,), (0,)), "layers: got 3 in function f, expected indices below 3"),
        (FunctionSpec("f", (2,), (8,)), "experts: got 8 in function f, expected indices below 8"),
    ],
)
def test_layers_and_experts_beyond_the_store_are_refused(
    store: Store, table: RoutingTable, spec: FunctionSpec, message: str
) -> None:
    more = replace(table, functions=(*table.functions, FunctionEndpoints(spec)))
    with pytest.raises(RoutingTableError, match=message):
        RoutingIndex.from_table(more, store)
