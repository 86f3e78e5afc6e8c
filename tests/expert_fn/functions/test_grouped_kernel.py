"""The grouped kernel matches the gated kernel; here on the CPU, in tests/gpu on a GPU.

Tolerances are relative to the largest output: 1e-6 in float32, where both sum the same products in
different order; 2**-7 in bfloat16, for the rounding of an output and of the product before it.
"""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from faasmoe_expert.functions.grouped_kernel import GroupedKernel, SortedPairs, supports_grouped_mm
from faasmoe_expert.functions.kernels import KernelSpec, RoutedPairs, gated_per_pair, gated_reduced
from faasmoe_expert.functions.stacks import StackedBlock
from faasmoe_expert.functions.weights import LayerWeights

CPU = torch.device("cpu")
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
BLOCK = (1, 2, 5)
HIDDEN, INTER = 24, 40
SILU = KernelSpec("gated", "silu", transposed=False, interleaved=False, bias=False)
SPECS = [
    pytest.param(
        KernelSpec(name, "gelu", transposed=t, interleaved=i, bias=b), id=f"{name}{t}{i}{b}"
    )
    for name in ("gated", "plain")
    for t in (False, True)
    for i in ((False, True) if name == "gated" else (False,))
    for b in (False, True)
]


def random_stacks(
    spec: KernelSpec, dtype: torch.dtype, *, hidden: int = HIDDEN, inter: int = INTER
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, width = ("gate_up_proj", 2 * inter) if spec.name == "gated" else ("up_proj", inter)
    stacks = {}
    for name, out_size, in_size in ((first, width, hidden), ("down_proj", hidden, inter)):
        weight = torch.randn(6, out_size, in_size, generator=generator) / in_size**0.5
        weight = weight.transpose(1, 2).contiguous() if spec.transposed else weight
        stacks[name] = weight.to(dtype)
        if spec.bias:
            stacks[f"{name}_bias"] = torch.randn(6, out_size, generator=generator).to(dtype)
    return stacks


def block_weights(stacks: dict[str, Tensor]) -> LayerWeights:
    position = {e: i for i, e in enumerate(BLOCK)}
    copies = {n: StackedBlock(stack[list(BLOCK)], position) for n, stack in stacks.items()}
    return LayerWeights(copies, {})


def grouped_kernel(spec: KernelSpec, stacks: dict[str, Tensor]) -> GroupedKernel:
    return GroupedKernel(spec, block_weights(stacks), BLOCK, CPU)


def random_pairs(n_rows: int, *, per_row: int = 2, seed: int = 1) -> RoutedPairs:
    """Return pairs of rows with `per_row` random experts of the block, unsorted."""
    generator = torch.Generator().manual_seed(seed)
    local = torch.rand(n_rows, len(BLOCK), generator=generator).topk(per_row).indices
    expert = torch.tensor(BLOCK)[local].reshape(-1)
    row = np.arange(n_rows, dtype=np.int32).repeat(per_row)
    weight = torch.rand(n_rows * per_row, generator=generator)
    return RoutedPairs(row, expert.int().numpy(), weight)


def random_rows(n_rows: int, dtype: torch.dtype, *, hidden: int = HIDDEN) -> Tensor:
    return torch.randn(n_rows, hidden, generator=torch.Generator().manual_seed(n_rows)).to(dtype)


def assert_close(got: Tensor, expected: Tensor, *, dtype: torch.dtype) -> None:
    """Compare sums, which are float32, of experts that compute in `dtype`, rounded to it."""
    assert got.dtype == expected.dtype == torch.float32
    error = (got.to(dtype).float() - expected.to(dtype).float()).abs().max()
    assert error <= TOLERANCES[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("spec", SPECS)
def test_reduced_outputs_match_the_gated_kernel(spec: KernelSpec, dtype: torch.dtype) -> None:
    stacks = random_stacks(spec, dtype)
    kernel = grouped_kernel(spec, stacks)
    for n_rows in (1, 2, 37):
        hidden, pairs = random_rows(n_rows, dtype), random_pairs(n_rows)
        expected = gated_reduced(spec, stacks, hidden, pairs)  # [T, H]
        assert_close(kernel.compute_reduced(hidden, pairs), expected, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_wide_layer_stays_within_the_tolerance(dtype: torch.dtype) -> None:
    stacks = random_stacks(SILU, dtype, hidden=256, inter=512)
    hidden, pairs = random_rows(64, dtype, hidden=256), random_pairs(64, per_row=3)
    expected = gated_reduced(SILU, stacks, hidden, pairs)
    assert_close(grouped_kernel(SILU, stacks).compute_reduced(hidden, pairs), expected, dtype=dtype)


@pytest.mark.parametrize("spec", SPECS)
def test_per_pair_outputs_are_bit_identical_to_the_gated_kernel(spec: KernelSpec) -> None:
    stacks = random_stacks(spec, torch.bfloat16)
    hidden, pairs = random_rows(19, torch.bfloat16), random_pairs(19)
    expected = gated_per_pair(spec, stacks, hidden, pairs)  # [P, H]
    assert torch.equal(grouped_kernel(spec, stacks).compute_per_pair(hidden, pairs), expected)


def test_reduced_outputs_are_independent_of_pair_order() -> None:
    stacks = random_stacks(SILU, torch.bfloat16)
    hidden, pairs = random_rows(23, torch.bfloat16), random_pairs(23, per_row=3)
    permutation = np.random.default_rng(0).permutation(len(pairs))
    other = RoutedPairs(
        pairs.row[permutation],
        pairs.expert[permutation],
        pairs.weight[torch.from_numpy(permutation)],
    )
    kernel = grouped_kernel(SILU, stacks)
    assert torch.equal(kernel.compute_reduced(hidden, other), kernel.compute_reduced(hidden, pairs))


def test_row_without_pairs_is_zero_and_repeated_pair_counts_twice() -> None:
    stacks = random_stacks(SILU, torch.float32)
    row, expert = np.array([2, 2, 0], dtype=np.int32), np.array([5, 5, 1], dtype=np.int32)
    pairs, hidden = (
        RoutedPairs(row, expert, torch.tensor([0.5, 0.25, 1.0])),
        random_rows(4, torch.float32),
    )
    got = grouped_kernel(SILU, stacks).compute_reduced(hidden, pairs)
    assert_close(got, gated_reduced(SILU, stacks, hidden, pairs), dtype=hidden.dtype)
    assert not got[1].any()
    assert not got[3].any()
    assert got[2].any()


def test_last_expert_of_the_block_may_have_no_pairs() -> None:
    stacks = random_stacks(SILU, torch.float32)
    row, expert = np.zeros(1, dtype=np.int32), np.ones(1, dtype=np.int32)
    pairs, hidden = RoutedPairs(row, expert, torch.ones(1)), random_rows(1, torch.float32)
    got = grouped_kernel(SILU, stacks).compute_reduced(hidden, pairs)
    assert_close(got, gated_reduced(SILU, stacks, hidden, pairs), dtype=hidden.dtype)


@given(st.data())
@settings(max_examples=60)
def test_slots_contain_each_rows_pairs_with_experts_ascending(data: st.DataObject) -> None:
    n_rows = data.draw(st.integers(1, 6))
    pair = st.tuples(st.integers(0, n_rows - 1), st.sampled_from(BLOCK))
    drawn_pairs = data.draw(st.lists(pair, max_size=14))
    row = np.array([r for r, _ in drawn_pairs], dtype=np.int32)
    expert = np.array([e for _, e in drawn_pairs], dtype=np.int32)
    position = np.zeros(6, dtype=np.int32)
    position[list(BLOCK)] = range(len(BLOCK))
    pairs = RoutedPairs(row, expert, torch.arange(len(drawn_pairs)).float())
    sorted_pairs = SortedPairs.from_pairs(pairs, position, n_rows=n_rows, n_experts=len(BLOCK))
    assert sorted_pairs.ends.tolist() == [sum(e <= b for _, e in drawn_pairs) for b in BLOCK]
    for r, slots in enumerate(sorted_pairs.slots):
        own_slots = [s for s in slots.tolist() if s < len(drawn_pairs)]
        assert [sorted_pairs.row[s] for s in own_slots] == [r] * len(own_slots)
        result = [(int(sorted_pairs.expert[s]), float(sorted_pairs.weight[s])) for s in own_slots]
        expected = sorted(
            (BLOCK.index(e), float(i)) for i, (x, e) in enumerate(drawn_pairs) if x == r
        )
        assert result == expected


@pytest.mark.parametrize(
    ("hidden", "inter", "dtype", "fits"),
    [
        (24, 40, torch.bfloat16, True),
        (24, 20, torch.bfloat16, False),
        (20, 40, torch.bfloat16, False),
        (20, 40, torch.float32, True),
        (18, 40, torch.float32, False),
    ],
)
def test_grouped_mm_requires_aligned_rows(
    hidden: int, inter: int, dtype: torch.dtype, fits: bool
) -> None:
    weights = block_weights(random_stacks(SILU, dtype, hidden=hidden, inter=inter))
    assert supports_grouped_mm(weights, CPU) is fits


@pytest.mark.parametrize(("capability", "can"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_grouped_mm_requires_a_recent_device(
    capability: tuple[int, int], can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    weights = block_weights(random_stacks(SILU, torch.bfloat16))
    assert supports_grouped_mm(weights, torch.device("cuda")) is can
