"""The general kernel computes the same from a copied block, as on CUDA, as from mapped stacks."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sandbox_processes import PreparedStore
from torch import Tensor

from faasmoe_contracts.store import Store
from faasmoe_expert.functions.kernels import RoutedPairs
from faasmoe_expert.functions.stacks import StackedBlock
from faasmoe_expert.functions.transformers_kernel import TransformersKernel
from faasmoe_expert.functions.weights import LayerWeights, map_weights

BLOCK = [1, 4, 6]
FAMILIES = ["gpt_oss", "muse_spark", "nemotron_h", "aria", "mixtral", "openai_privacy_filter"]


def kernel_of(store: Store, weights: LayerWeights) -> TransformersKernel:
    model, layer = store.manifest.model, store.manifest.layers[0]
    return TransformersKernel.from_store(
        store.path / "model", model.architecture, layer.name, weights, BLOCK
    )


def mapped(store: Store) -> LayerWeights:
    n_experts = store.manifest.layers[0].num_experts
    return map_weights(store.map_layer(0), n_experts=n_experts)


def stacked(parts: Sequence[Tensor]) -> StackedBlock:
    return StackedBlock(torch.stack(list(parts)), {e: i for i, e in enumerate(BLOCK)})


def copied(weights: LayerWeights) -> LayerWeights:
    """Copy only the block's experts, as is done for a device."""
    copies = {
        name: stacked([stack[e] for e in BLOCK])  # [...] each
        for name, stack in weights.stacked.items()
    }
    return LayerWeights(copies, weights.shared)


@pytest.fixture(params=FAMILIES)
def store(request: pytest.FixtureRequest, prepared_store: PreparedStore) -> Store:
    return prepared_store(request.param)


def routed(store: Store) -> tuple[Tensor, "torch.Tensor"]:
    generator = torch.Generator().manual_seed(3)
    hidden_size = store.manifest.layers[0].hidden_size
    hidden = torch.randn(9, hidden_size, generator=generator)  # [T, H]
    return hidden, torch.rand(27, generator=generator)  # [P]


def every_expert(weight: Tensor) -> RoutedPairs:
    """Route each of 9 rows to each expert of the block."""
    row = torch.arange(9).repeat_interleave(3).int().numpy()  # [P]
    return RoutedPairs(row, torch.tensor(BLOCK * 9).int().numpy(), weight)


def test_sums_do_not_depend_on_the_order_of_a_rows_experts(store: Store) -> None:
    hidden, weight = routed(store)
    pairs, kernel = every_expert(weight), kernel_of(store, mapped(store))
    turned = np.arange(27).reshape(9, 3)[:, [2, 0, 1]].reshape(-1)
    other = RoutedPairs(pairs.row[turned], pairs.expert[turned], weight[turned])
    assert torch.equal(kernel.compute_reduced(hidden, other), kernel.compute_reduced(hidden, pairs))


@pytest.mark.parametrize("method", ["compute_per_pair", "compute_reduced"])
def test_copied_block_computes_the_same_as_the_mapped_stack(store: Store, method: str) -> None:
    hidden, weight = routed(store)
    pairs = every_expert(weight)
    whole = mapped(store)
    results = [
        getattr(kernel_of(store, weights), method)(hidden, pairs)
        for weights in (whole, copied(whole))
    ]
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-6)
    assert results[0].abs().max() > 1e-3


def test_kernels_of_one_model_do_not_share_weights(prepared_store: PreparedStore) -> None:
    store = prepared_store("gpt_oss")
    hidden, weight = routed(store)
    pairs = RoutedPairs(np.zeros(1, dtype=np.int32), np.array([4], dtype=np.int32), weight[:1])
    first = kernel_of(store, mapped(store))
    before = first.compute_reduced(hidden, pairs)
    other = LayerWeights(
        {
            name: stacked([torch.zeros_like(stack[e]) for e in BLOCK])
            for name, stack in mapped(store).stacked.items()
        },
        {},
    )
    assert not kernel_of(store, other).compute_reduced(hidden, pairs).any()
    assert torch.equal(first.compute_reduced(hidden, pairs), before)
