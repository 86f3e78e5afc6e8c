"""The native kernel equals the float32 reference, whatever else a frame holds."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from faasmoe_expert.functions import native_kernel
from faasmoe_expert.functions.kernels import (
    ACTIVATIONS,
    KernelSpec,
    RoutedPairs,
    gated_per_pair,
    gated_reduced,
)
from faasmoe_expert.functions.native_kernel import NativeKernel, UnsupportedLayer
from faasmoe_expert.functions.stacks import StackedBlock
from faasmoe_expert.functions.weights import LayerWeights
from faasmoe_kernels import KernelError, KernelLibrary, KernelsUnavailable, load

N_EXPERTS, HIDDEN, INTER, TOP_K = 6, 40, 24, 2
BLOCK = (1, 2, 4, 5)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = [
    (name, interleaved, bias)
    for name, interleaved, bias in itertools.product(
        ("gated", "plain"), (False, True), (False, True)
    )
    if name == "gated" or not interleaved
]


@pytest.fixture(scope="module")
def library() -> KernelLibrary:
    try:
        return load()
    except KernelsUnavailable as error:
        pytest.skip(str(error))


def make_spec(**fields: Any) -> KernelSpec:
    defaults = {
        "name": "gated",
        "activation": "silu",
        "transposed": False,
        "interleaved": False,
        "bias": False,
    }
    return KernelSpec(**{**defaults, **fields})


def random_weights(spec: KernelSpec, dtype: torch.dtype) -> LayerWeights:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).div(float(shape[-1]) ** 0.5).to(dtype)

    first, wide = ("gate_up_proj", 2 * INTER) if spec.name == "gated" else ("up_proj", INTER)
    stacked: dict[str, Tensor | StackedBlock] = {
        first: random(N_EXPERTS, wide, HIDDEN),
        "down_proj": random(N_EXPERTS, HIDDEN, INTER),
    }
    if spec.bias:
        stacked |= {
            f"{first}_bias": random(N_EXPERTS, wide),
            "down_proj_bias": random(N_EXPERTS, HIDDEN),
        }
    return LayerWeights(stacked, {})


def random_frame(n_rows: int, dtype: torch.dtype) -> tuple[Tensor, RoutedPairs]:
    rng = np.random.default_rng(n_rows)
    hidden = torch.from_numpy(rng.standard_normal((n_rows, HIDDEN))).to(dtype)  # [T, H]
    expert = np.concatenate([rng.permutation(BLOCK)[:TOP_K] for _ in range(n_rows)])
    weight = torch.from_numpy(rng.uniform(0, 1, n_rows * TOP_K).astype(np.float32))
    row = np.repeat(np.arange(n_rows, dtype=np.int32), TOP_K)
    return hidden, RoutedPairs(row, expert.astype(np.int32), weight)


def as_float32(weights: LayerWeights) -> dict[str, Any]:
    return {name: stack.float() for name, stack in weights.stacked.items()}  # type: ignore[union-attr]


def assert_rounds_to(actual: Tensor, expected: Tensor) -> None:
    """Assert that `actual` is `expected` (float32, within 1e-4) rounded to its own dtype."""
    resolution = torch.finfo(actual.dtype).eps / 2
    error = (actual.float() - expected).abs()
    assert bool((error <= 1e-4 + 1.01 * resolution * expected.abs()).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "interleaved", "bias"), FORMS)
def test_equals_the_gated_kernel_in_float32(
    library: KernelLibrary, name: str, interleaved: bool, bias: bool, dtype: torch.dtype
) -> None:
    spec = make_spec(name=name, interleaved=interleaved, bias=bias)
    weights = random_weights(spec, dtype)
    kernel = NativeKernel(spec, weights, BLOCK, library)
    for n_rows in (1, 3, 40):
        hidden, pairs = random_frame(n_rows, dtype)
        reference = (spec, as_float32(weights), hidden.float(), pairs)
        assert_rounds_to(kernel.compute_reduced(hidden, pairs), gated_reduced(*reference))
        assert_rounds_to(kernel.compute_per_pair(hidden, pairs), gated_per_pair(*reference))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_knows_every_activation_of_the_gated_kernel(
    library: KernelLibrary, activation: str
) -> None:
    spec = make_spec(activation=activation)
    weights = random_weights(spec, torch.float32)
    hidden, pairs = random_frame(9, torch.float32)
    actual = NativeKernel(spec, weights, BLOCK, library).compute_reduced(hidden, pairs)
    assert_rounds_to(actual, gated_reduced(spec, as_float32(weights), hidden, pairs))


@pytest.mark.parametrize("is_fast", [True, False])
def test_many_rows_per_expert_are_computed_by_torch_where_onednn_is_fast(
    library: KernelLibrary, monkeypatch: pytest.MonkeyPatch, is_fast: bool
) -> None:
    spec, computed = make_spec(), []

    class LargeBatches:
        def compute_reduced(self, hidden: torch.Tensor, pairs: RoutedPairs) -> torch.Tensor:
            computed.append(len(hidden))
            return torch.zeros_like(hidden)

    monkeypatch.setattr(native_kernel, "is_fast_on_cpu", lambda dtype: is_fast)
    kernel = NativeKernel(
        spec,
        random_weights(spec, torch.bfloat16),
        BLOCK,
        library,
        large_batch_kernel=LargeBatches(),
    )
    for n_rows in (1, 60):
        kernel.compute_reduced(*random_frame(n_rows, torch.bfloat16))
        kernel.compute_per_pair(*random_frame(n_rows, torch.bfloat16))
    assert computed == ([60] if is_fast else [])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone_and_among_others(
    library: KernelLibrary, dtype: torch.dtype
) -> None:
    spec = make_spec()
    kernel = NativeKernel(spec, random_weights(spec, dtype), BLOCK, library)
    hidden, pairs = random_frame(50, dtype)
    reduced, per_pair = (
        kernel.compute_reduced(hidden, pairs),
        kernel.compute_per_pair(hidden, pairs),
    )
    for row in (0, 17, 49):
        mine = pairs.row == row
        alone = RoutedPairs(
            pairs.row[mine] * 0, pairs.expert[mine], pairs.weight[torch.from_numpy(mine)]
        )
        one = hidden[row : row + 1]
        assert torch.equal(kernel.compute_reduced(one, alone)[0], reduced[row])
        assert torch.equal(kernel.compute_per_pair(one, alone), per_pair[torch.from_numpy(mine)])


def test_an_expert_outside_the_block_is_an_error(library: KernelLibrary) -> None:
    spec = make_spec()
    kernel = NativeKernel(spec, random_weights(spec, torch.float32), BLOCK, library)
    pairs = RoutedPairs(np.zeros(1, np.int32), np.full(1, 3, np.int32), torch.ones(1))
    with pytest.raises(KernelError):
        kernel.compute_reduced(torch.ones(1, HIDDEN), pairs)


def test_layers_of_other_forms_are_refused(library: KernelLibrary) -> None:
    spec = make_spec()
    weights = random_weights(spec, torch.float32)
    with pytest.raises(UnsupportedLayer, match=r"\[in, out\]"):
        NativeKernel(make_spec(transposed=True), weights, BLOCK, library)
    doubles = random_weights(spec, torch.float64)
    with pytest.raises(UnsupportedLayer, match="float64"):
        NativeKernel(spec, doubles, BLOCK, library)
    copies = {name: StackedBlock(stack, {}) for name, stack in as_float32(weights).items()}
    with pytest.raises(UnsupportedLayer, match="not in host memory"):
        NativeKernel(spec, LayerWeights(copies, {}), BLOCK, library)
