"""Address updates of a routing index, and its missing functions."""

import math

import pytest
from sandbox_processes import PreparedStore, block_specs

from faasmoe_contracts.routing_table import FunctionEndpoints, RoutingTable, RoutingTableError
from faasmoe_contracts.store import Store
from faasmoe_router.dispatch.routing import RoutingIndex


@pytest.fixture(scope="module")
def store(prepared_store: PreparedStore) -> Store:
    return prepared_store("mixtral")


@pytest.fixture(scope="module")
def routing(store: Store) -> RoutingIndex:
    """One function for each expert; all but the first have an address."""
    specs = block_specs(store, 1)
    entries = [FunctionEndpoints(spec, ("h:1",)) for spec in specs]
    entries[0] = FunctionEndpoints(specs[0])
    return RoutingIndex.from_table(RoutingTable(store.manifest.digest, 3, tuple(entries)), store)


def test_update_changes_only_its_functions(routing: RoutingIndex) -> None:
    first, second, *_, last = routing.entries
    updated = routing.with_addresses(4, {first: ("h:2", "h:3"), last: ()})
    assert updated.version == 4
    assert updated.missing == (last,)
    assert updated.addresses() == {"h:1", "h:2", "h:3"}
    assert updated.layers[0].functions[0] is updated.entries[first]
    assert updated.layers[-1].functions[-1] is updated.entries[last]
    assert updated.entries[second] is routing.entries[second]
    assert routing.missing == (first,)


def test_update_of_an_unknown_function_is_refused(routing: RoutingIndex) -> None:
    with pytest.raises(RoutingTableError, match="functions: got unknown"):
        routing.with_addresses(4, {"unknown": ()})


def test_missing_functions_depend_on_the_number_of_tokens(
    routing: RoutingIndex, store: Store
) -> None:
    first = next(iter(routing.entries))
    layer = store.manifest.layers[0]
    miss_probability = (1 - 1 / layer.num_experts) ** layer.top_k
    n_tokens = math.ceil(math.log(0.5) / math.log(miss_probability))
    assert routing.activated_below_tokens == n_tokens > 1
    assert routing.missing_for(n_tokens - 1) == ()
    assert routing.missing_for(n_tokens) == (first,)


def test_nothing_is_missing_when_all_functions_have_addresses(routing: RoutingIndex) -> None:
    complete = routing.with_addresses(4, {routing.missing[0]: ("h:1",)})
    assert complete.activated_below_tokens == math.inf
    assert complete.missing_for(10**6) == ()


def test_empty_routing_has_one_block_per_layer_and_none_missing(store: Store) -> None:
    routing = RoutingIndex.empty(store)
    assert [len(layer.functions) for layer in routing.layers] == [1] * len(routing.layers)
    assert routing.missing == ()
    assert routing.addresses() == frozenset()
