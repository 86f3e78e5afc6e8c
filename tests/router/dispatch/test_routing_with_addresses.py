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
    """One function for each expert, all but the first of them at one address."""
    specs = block_specs(store, 1)
    entries = [FunctionEndpoints(spec, ("h:1",)) for spec in specs]
    entries[0] = FunctionEndpoints(specs[0])
    return RoutingIndex.from_table(RoutingTable(store.manifest.digest, 3, tuple(entries)), store)


def test_a_move_changes_its_functions_and_nothing_else(routing: RoutingIndex) -> None:
    first, second, *_, last = routing.entries
    moved = routing.with_addresses(4, {first: ("h:2", "h:3"), last: ()})
    assert moved.version == 4
    assert moved.missing == (last,)
    assert moved.addresses() == {"h:1", "h:2", "h:3"}
    assert moved.layers[0].functions[0] is moved.entries[first]
    assert moved.layers[-1].functions[-1] is moved.entries[last]
    assert moved.entries[second] is routing.entries[second]
    assert routing.missing == (first,)


def test_a_move_of_an_unknown_function_is_refused(routing: RoutingIndex) -> None:
    with pytest.raises(RoutingTableError, match="functions: got nobody"):
        routing.with_addresses(4, {"nobody": ()})


def test_what_is_missing_depends_on_how_many_tokens_need_it(
    routing: RoutingIndex, store: Store
) -> None:
    first = next(iter(routing.entries))
    layer = store.manifest.layers[0]
    spared = (1 - 1 / layer.num_experts) ** layer.top_k
    n_tokens = math.ceil(math.log(0.5) / math.log(spared))
    assert routing.activated_below_tokens == n_tokens > 1
    assert routing.missing_for(n_tokens - 1) == ()
    assert routing.missing_for(n_tokens) == (first,)


def test_a_table_with_all_its_addresses_lacks_nothing(routing: RoutingIndex) -> None:
    complete = routing.with_addresses(4, {routing.missing[0]: ("h:1",)})
    assert complete.activated_below_tokens == math.inf
    assert complete.missing_for(10**6) == ()


def test_before_any_table_every_layer_is_one_block_that_is_not_asked_for(store: Store) -> None:
    routing = RoutingIndex.empty(store)
    assert [len(layer.functions) for layer in routing.layers] == [1] * len(routing.layers)
    assert routing.missing == ()
    assert routing.addresses() == frozenset()
