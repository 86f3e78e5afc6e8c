import math

import pytest
from sandboxes import PreparedStore, block_specs

from faasmoe_expert.store import Store
from faasmoe_expert.table import FunctionEntry, FunctionTable, TableError
from faasmoe_router.dispatch.routing import Routing


@pytest.fixture(scope="module")
def store(prepared_store: PreparedStore) -> Store:
    return prepared_store("mixtral")


@pytest.fixture(scope="module")
def routing(store: Store) -> Routing:
    """One function for each expert, all but the first of them at one address."""
    specs = block_specs(store, 1)
    entries = [FunctionEntry(spec, ("h:1",)) for spec in specs]
    entries[0] = FunctionEntry(specs[0])
    return Routing.from_table(FunctionTable(store.manifest.digest, 3, tuple(entries)), store)


def test_a_move_changes_its_functions_and_nothing_else(routing: Routing) -> None:
    first, second, *_, last = routing.entries
    moved = routing.moved(4, {first: ("h:2", "h:3"), last: ()})
    assert moved.version == 4
    assert moved.missing == (last,)
    assert moved.addresses() == {"h:1", "h:2", "h:3"}
    assert moved.layers[0].functions[0] is moved.entries[first]
    assert moved.layers[-1].functions[-1] is moved.entries[last]
    assert moved.entries[second] is routing.entries[second]
    assert routing.missing == (first,)


def test_a_move_of_an_unknown_function_is_refused(routing: Routing) -> None:
    with pytest.raises(TableError, match="functions: got nobody"):
        routing.moved(4, {"nobody": ()})


def test_what_is_missing_depends_on_how_many_tokens_need_it(routing: Routing, store: Store) -> None:
    first = next(iter(routing.entries))
    layer = store.manifest.layers[0]
    spared = (1 - 1 / layer.num_experts) ** layer.top_k
    n_tokens = math.ceil(math.log(0.5) / math.log(spared))
    assert routing.complete_below == n_tokens > 1
    assert routing.missing_for(n_tokens - 1) == ()
    assert routing.missing_for(n_tokens) == (first,)


def test_a_table_with_all_its_addresses_lacks_nothing(routing: Routing) -> None:
    complete = routing.moved(4, {routing.missing[0]: ("h:1",)})
    assert complete.complete_below == math.inf
    assert complete.missing_for(10**6) == ()


def test_before_any_table_every_layer_is_one_block_that_is_not_asked_for(store: Store) -> None:
    routing = Routing.before_any_table(store)
    assert [len(layer.functions) for layer in routing.layers] == [1] * len(routing.layers)
    assert routing.missing == ()
    assert routing.addresses() == frozenset()
