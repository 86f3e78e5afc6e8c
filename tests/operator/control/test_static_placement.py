from hypothesis import given
from hypothesis import strategies as st

from faasmoe_contracts.routing_table import FunctionSpec
from faasmoe_operator.control.static_placement import spread_functions


def functions(layers: int, blocks: int) -> list[FunctionSpec]:
    return [
        FunctionSpec(f"l{layer}b{block}", (layer,), (block,))
        for layer in range(layers)
        for block in range(blocks)
    ]


@given(layers=st.integers(1, 30), blocks=st.integers(1, 6), capacity=st.integers(1, 40))
def test_spreads_every_function_once_evenly_over_the_fewest_sandboxes(
    layers: int, blocks: int, capacity: int
) -> None:
    planned = functions(layers, blocks)
    groups = spread_functions(planned, capacity=capacity)
    assert sorted(f.id for group in groups for f in group) == sorted(f.id for f in planned)
    sizes = [len(group) for group in groups]
    assert max(sizes) <= capacity
    assert max(sizes) - min(sizes) <= 1
    assert len(groups) == -(-len(planned) // capacity)


def test_spreads_the_blocks_of_a_layer_over_sandboxes() -> None:
    for group in spread_functions(functions(27, 3), capacity=27):
        assert len({f.layers for f in group}) == len(group)
