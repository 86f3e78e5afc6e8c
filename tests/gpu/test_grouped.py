"""The grouped kernel on the device against the mapped kernel on the CPU.

Tolerances are of the largest output. bfloat16 2**-6: both round to 8 bits after each product, over
other orders of sums; float16 2**-9; float32 1e-5, without TF32.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from faasmoe_expert.functions.grouped_kernel import GroupedKernel, supports_grouped_mm
from faasmoe_expert.functions.kernels import KernelSpec, RoutedPairs, gated_reduced
from faasmoe_expert.functions.stacks import StackedBlock
from faasmoe_expert.functions.weights import LayerWeights

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
SILU = KernelSpec("gated", "silu", transposed=False, interleaved=False, bias=False)
FORMS = [
    pytest.param(
        KernelSpec(name, "gelu", transposed=t, interleaved=i, bias=b), id=f"{name}{t}{i}{b}"
    )
    for name in ("gated", "plain")
    for t in (False, True)
    for i in ((False, True) if name == "gated" else (False,))
    for b in (False, True)
]
SMALL, QWEN = (64, 96, 6), (2048, 1408, 20)  # hidden, intermediate, experts


def stacks_of(
    spec: KernelSpec, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> dict[str, Tensor]:
    hidden, inter, n_experts = sizes
    generator = torch.Generator().manual_seed(0)
    first, width = ("gate_up_proj", 2 * inter) if spec.name == "gated" else ("up_proj", inter)
    stacks = {}
    for name, out_size, in_size in ((first, width, hidden), ("down_proj", hidden, inter)):
        weight = torch.randn(n_experts, out_size, in_size, generator=generator) / in_size**0.5
        stacks[name] = (weight.transpose(1, 2).contiguous() if spec.transposed else weight).to(
            dtype
        )
        if spec.bias:
            bias = torch.randn(n_experts, out_size, generator=generator)
            stacks[f"{name}_bias"] = bias.to(dtype)
    return stacks


def kernel_on(device: torch.device, spec: KernelSpec, stacks: dict[str, Tensor]) -> GroupedKernel:
    experts = tuple(range(len(next(iter(stacks.values())))))
    position = {e: e for e in experts}
    weights = LayerWeights({n: StackedBlock(s.to(device), position) for n, s in stacks.items()}, {})
    assert supports_grouped_mm(weights, device)
    return GroupedKernel(spec, weights, experts, device)


def frame(
    n_rows: int, dtype: torch.dtype, sizes: tuple[int, int, int], *, per_row: int = 3
) -> tuple[Tensor, RoutedPairs]:
    hidden_size, _, n_experts = sizes
    generator = torch.Generator().manual_seed(n_rows)
    hidden = torch.randn(n_rows, hidden_size, generator=generator).to(dtype)
    expert = torch.rand(n_rows, n_experts, generator=generator).topk(per_row).indices.reshape(-1)
    weight = torch.rand(n_rows * per_row, generator=generator)
    row = np.arange(n_rows, dtype=np.int32).repeat(per_row)
    return hidden, RoutedPairs(row, expert.int().numpy(), weight)


def assert_close(got: Tensor, expected: Tensor, *, dtype: torch.dtype) -> None:
    """Compare sums, which are float32, of experts that compute in `dtype`."""
    assert got.device.type == "cpu"
    assert got.dtype == expected.dtype == torch.float32
    error = (got - expected).abs().max()
    assert error <= TOLERANCES[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("spec", FORMS)
def test_sums_are_those_of_the_mapped_kernel(
    spec: KernelSpec, dtype: torch.dtype, cuda: torch.device
) -> None:
    stacks = stacks_of(spec, dtype, SMALL)
    kernel = kernel_on(cuda, spec, stacks)
    for n_rows in (1, 2, 37, 300):
        hidden, pairs = frame(n_rows, dtype, SMALL)
        expected = gated_reduced(spec, stacks, hidden, pairs)  # [T, H]
        assert_close(kernel.compute_reduced(hidden, pairs), expected, dtype=dtype)


@pytest.mark.parametrize("n_rows", [1, 8, 64, 256])
def test_block_of_full_size_agrees(n_rows: int, cuda: torch.device) -> None:
    stacks = stacks_of(SILU, torch.bfloat16, QWEN)
    hidden, pairs = frame(n_rows, torch.bfloat16, QWEN)
    got = kernel_on(cuda, SILU, stacks).compute_reduced(hidden, pairs)
    assert_close(got, gated_reduced(SILU, stacks, hidden, pairs), dtype=hidden.dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_same_frame_gives_the_same_bits(dtype: torch.dtype, cuda: torch.device) -> None:
    kernel = kernel_on(cuda, SILU, stacks_of(SILU, dtype, SMALL))
    hidden, pairs = frame(200, dtype, SMALL)
    first = kernel.compute_reduced(hidden, pairs)
    assert all(torch.equal(kernel.compute_reduced(hidden, pairs), first) for _ in range(20))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_pair_has_the_same_bits_in_any_batch(dtype: torch.dtype, cuda: torch.device) -> None:
    kernel = kernel_on(cuda, SILU, stacks_of(SILU, dtype, SMALL))
    hidden, pairs = frame(35, dtype, SMALL)
    together = kernel.compute_per_pair(hidden, pairs)  # [P, H]
    for pair in range(len(pairs)):
        one = RoutedPairs(np.zeros(1, np.int32), pairs.expert[pair, None], pairs.weight[pair, None])
        alone = kernel.compute_per_pair(hidden[pairs.row[pair], None], one)  # [1, H]
        assert torch.equal(alone[0], together[pair])
