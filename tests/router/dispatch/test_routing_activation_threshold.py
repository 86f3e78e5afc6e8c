"""From how many tokens on a function is probably needed."""

import pytest

from faasmoe_router.dispatch.routing import activation_threshold_tokens


@pytest.mark.parametrize(
    ("n_block_experts", "layer_shapes", "expected"),
    [
        pytest.param(20, [(60, 4)], 1, id="a third of the experts: (2/3)^4 = 0.20 at one token"),
        pytest.param(1, [(60, 4)], 11, id="one expert: (59/60)^40 = 0.51, (59/60)^44 = 0.48"),
        pytest.param(1, [(60, 4)] * 24, 1, id="one expert in 24 layers: (59/60)^96 = 0.20"),
        pytest.param(1, [(8, 1)], 6, id="(7/8)^5 = 0.51, (7/8)^6 = 0.45"),
        pytest.param(8, [(8, 2)], 1, id="a whole layer"),
        pytest.param(1, [(60, 1), (1, 1)], 1, id="a whole layer of two"),
    ],
)
def test_threshold_is_where_a_call_becomes_more_likely_than_not(
    n_block_experts: int, layer_shapes: list[tuple[int, int]], expected: int
) -> None:
    assert activation_threshold_tokens(n_block_experts, layer_shapes) == expected
