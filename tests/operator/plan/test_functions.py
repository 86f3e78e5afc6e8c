from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faasmoe_operator.errors import PlanError
from faasmoe_operator.plan.functions import (
    Partitioning,
    function_bytes,
    largest_function_bytes,
    plan_functions,
)

KEY = b"k" * 16


@dataclass(frozen=True)
class Layer:
    index: int
    num_experts: int
    top_k: int = 2
    expert_bytes: int = 10
    shared_bytes: int = 1


def layers(*num_experts: int) -> list[Layer]:
    return [Layer(index, count) for index, count in enumerate(num_experts)]


def blocks(
    partitioning: Partitioning, *num_experts: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    functions = plan_functions(layers(*num_experts), partitioning, model_digest="sha256:0", key=KEY)
    return [(f.layers, f.experts) for f in functions]


def test_last_block_may_be_smaller() -> None:
    assert blocks(Partitioning(3), 8) == [((0,), (0, 1, 2)), ((0,), (3, 4, 5)), ((0,), (6, 7))]


@pytest.mark.parametrize(
    ("num_experts", "sizes"), [(60, [20, 20, 20]), (8, [3, 3, 2]), (2, [1, 1]), (1, [1])]
)
def test_default_partitioning_makes_about_three_blocks_per_layer(
    num_experts: int, sizes: list[int]
) -> None:
    assert [len(experts) for _, experts in blocks(Partitioning(), num_experts)] == sizes


def test_function_spans_the_same_block_of_several_layers() -> None:
    partitioning = Partitioning(experts_per_function=2, layers_per_function=2)
    assert blocks(partitioning, 4, 4, 4) == [
        ((0, 1), (0, 1)),
        ((0, 1), (2, 3)),
        ((2,), (0, 1)),
        ((2,), (2, 3)),
    ]


def test_function_spans_only_layers_with_equal_expert_counts() -> None:
    partitioning = Partitioning(experts_per_function=4, layers_per_function=2)
    assert blocks(partitioning, 2, 4, 4) == [((0,), (0, 1)), ((1, 2), (0, 1, 2, 3))]


@given(
    num_experts=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    experts_per_function=st.none() | st.integers(1, 12),
    layers_per_function=st.integers(1, 8),
)
def test_every_expert_is_in_exactly_one_function(
    num_experts: list[int], experts_per_function: int | None, layers_per_function: int
) -> None:
    partitioning = Partitioning(
        experts_per_function and min(experts_per_function, max(num_experts)),
        min(layers_per_function, len(num_experts)),
    )
    shapes = layers(*num_experts)
    functions = plan_functions(shapes, partitioning, model_digest="sha256:0", key=KEY)
    covered = Counter((layer, e) for f in functions for layer in f.layers for e in f.experts)
    assert covered == Counter(
        (layer.index, e) for layer in shapes for e in range(layer.num_experts)
    )
    assert len({f.id for f in functions}) == len(functions)
    total = sum(layer.num_experts * layer.expert_bytes for layer in shapes)
    shared = sum(len(f.layers) for f in functions)
    sizes = [function_bytes(f, shapes) for f in functions]
    assert sum(sizes) == total + shared
    assert max(sizes) == largest_function_bytes(shapes, partitioning)


def test_function_ids_depend_on_the_key_and_the_model() -> None:
    def ids(digest: str, key: bytes) -> list[str]:
        functions = plan_functions(layers(4), Partitioning(2), model_digest=digest, key=key)
        return [f.id for f in functions]

    assert ids("sha256:0", KEY) == ids("sha256:0", KEY)
    assert not set(ids("sha256:0", KEY)) & set(ids("sha256:1", KEY))
    assert not set(ids("sha256:0", KEY)) & set(ids("sha256:0", b"other"))


@pytest.mark.parametrize(
    ("partitioning", "num_experts", "message"),
    [
        pytest.param(
            Partitioning(61),
            (60, 60),
            "spec.granularity.expertsPerFunction: got 61, expected at most 60, "
            "the experts of layer 0",
            id="more-experts-than-a-layer-has",
        ),
        pytest.param(
            Partitioning(9),
            (4, 8),
            "spec.granularity.expertsPerFunction: got 9, expected at most 8, "
            "the experts of layer 1",
            id="more-experts-than-the-largest-layer-has",
        ),
        pytest.param(
            Partitioning(0),
            (4,),
            "spec.granularity.expertsPerFunction: got 0, expected 1 or more",
            id="zero-experts",
        ),
        pytest.param(
            Partitioning(layers_per_function=3),
            (4, 4),
            "spec.granularity.layersPerFunction: got 3, expected at most 2, "
            "the MoE layers of the model",
            id="more-layers-than-the-model-has",
        ),
        pytest.param(
            Partitioning(),
            (),
            "layers: got a model without MoE layers, expected at least one",
            id="dense",
        ),
    ],
)
def test_rejects_invalid_partitionings(
    partitioning: Partitioning, num_experts: tuple[int, ...], message: str
) -> None:
    with pytest.raises(PlanError) as caught:
        plan_functions(layers(*num_experts), partitioning, model_digest="sha256:0", key=KEY)
    assert str(caught.value) == message
