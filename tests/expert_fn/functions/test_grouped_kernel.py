"""The grouped kernel computes what the mapped one does; here on the CPU, in tests/gpu on a GPU.

Tolerances are of the largest output: in float32 1e-6, as both sum the same products in other
orders; in bfloat16 2**-7, an output's own rounding and that of the product before it.
"""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from faasmoe_expert.functions.grouped_kernel import GroupedKernel, SortedPairs, supports_grouped_mm
from faasmoe_expert.functions.kernels import KernelSpec, RoutedPairs, gated_per_pair, gated_reduced
from faasmoe_expert.functions.weights import LayerWeights, StackedBlock, consecutive_runs

CPU = torch.device("cpu")
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
BLOCK = (1, 2, 5)
HIDDEN, INTER = 24, 40
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


def whole_stacks(
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


def block_of(stacks: dict[str, Tensor]) -> LayerWeights:
    position = {e: i for i, e in enumerate(BLOCK)}
    copies = {n: StackedBlock(stack[list(BLOCK)], position) for n, stack in stacks.items()}
    return LayerWeights(copies, {})


def kernel_of(spec: KernelSpec, stacks: dict[str, Tensor]) -> GroupedKernel:
    return GroupedKernel(spec, block_of(stacks), BLOCK, CPU)


def pairs_for(n_rows: int, *, per_row: int = 2, seed: int = 1) -> RoutedPairs:
    """Rows, each for some experts of the block, in no order of experts."""
    generator = torch.Generator().manual_seed(seed)
    local = torch.rand(n_rows, len(BLOCK), generator=generator).topk(per_row).indices
    expert = torch.tensor(BLOCK)[local].reshape(-1)
    row = np.arange(n_rows, dtype=np.int32).repeat(per_row)
    weight = torch.rand(n_rows * per_row, generator=generator)
    return RoutedPairs(row, expert.int().numpy(), weight)


def rows_of(n_rows: int, dtype: torch.dtype, *, hidden: int = HIDDEN) -> Tensor:
    return torch.randn(n_rows, hidden, generator=torch.Generator().manual_seed(n_rows)).to(dtype)


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    error = (got.float() - expected.float()).abs().max()
    assert error <= TOLERANCES[got.dtype] * expected.float().abs().max()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("spec", FORMS)
def test_sums_are_those_of_the_mapped_kernel(spec: KernelSpec, dtype: torch.dtype) -> None:
    stacks = whole_stacks(spec, dtype)
    kernel = kernel_of(spec, stacks)
    for n_rows in (1, 2, 37):
        hidden, pairs = rows_of(n_rows, dtype), pairs_for(n_rows)
        expected = gated_reduced(spec, stacks, hidden, pairs)  # [T, H]
        assert_close(kernel.compute_reduced(hidden, pairs), expected)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_wide_layer_stays_within_the_tolerance(dtype: torch.dtype) -> None:
    stacks = whole_stacks(SILU, dtype, hidden=256, inter=512)
    hidden, pairs = rows_of(64, dtype, hidden=256), pairs_for(64, per_row=3)
    expected = gated_reduced(SILU, stacks, hidden, pairs)
    assert_close(kernel_of(SILU, stacks).compute_reduced(hidden, pairs), expected)


@pytest.mark.parametrize("spec", FORMS)
def test_pairs_have_the_bits_of_the_mapped_kernel(spec: KernelSpec) -> None:
    stacks = whole_stacks(spec, torch.bfloat16)
    hidden, pairs = rows_of(19, torch.bfloat16), pairs_for(19)
    expected = gated_per_pair(spec, stacks, hidden, pairs)  # [P, H]
    assert torch.equal(kernel_of(spec, stacks).compute_per_pair(hidden, pairs), expected)


def test_a_sum_has_the_same_bits_whatever_the_order_of_its_pairs() -> None:
    stacks = whole_stacks(SILU, torch.bfloat16)
    hidden, pairs = rows_of(23, torch.bfloat16), pairs_for(23, per_row=3)
    turned = np.random.default_rng(0).permutation(len(pairs))
    other = RoutedPairs(
        pairs.row[turned], pairs.expert[turned], pairs.weight[torch.from_numpy(turned)]
    )
    kernel = kernel_of(SILU, stacks)
    assert torch.equal(kernel.compute_reduced(hidden, other), kernel.compute_reduced(hidden, pairs))


def test_a_row_without_pairs_gets_zeros_and_a_repeated_pair_counts_twice() -> None:
    stacks = whole_stacks(SILU, torch.float32)
    row, expert = np.array([2, 2, 0], dtype=np.int32), np.array([5, 5, 1], dtype=np.int32)
    pairs, hidden = (
        RoutedPairs(row, expert, torch.tensor([0.5, 0.25, 1.0])),
        rows_of(4, torch.float32),
    )
    got = kernel_of(SILU, stacks).compute_reduced(hidden, pairs)
    assert_close(got, gated_reduced(SILU, stacks, hidden, pairs))
    assert not got[1].any()
    assert not got[3].any()
    assert got[2].any()


def test_the_last_expert_of_the_block_may_be_without_pairs() -> None:
    stacks = whole_stacks(SILU, torch.float32)
    row, expert = np.zeros(1, dtype=np.int32), np.ones(1, dtype=np.int32)
    pairs, hidden = RoutedPairs(row, expert, torch.ones(1)), rows_of(1, torch.float32)
    got = kernel_of(SILU, stacks).compute_reduced(hidden, pairs)
    assert_close(got, gated_reduced(SILU, stacks, hidden, pairs))


@given(st.data())
@settings(max_examples=60)
def test_slots_lead_each_row_to_its_pairs_experts_ascending(data: st.DataObject) -> None:
    n_rows = data.draw(st.integers(1, 6))
    pair = st.tuples(st.integers(0, n_rows - 1), st.sampled_from(BLOCK))
    drawn = data.draw(st.lists(pair, max_size=14))
    row = np.array([r for r, _ in drawn], dtype=np.int32)
    expert = np.array([e for _, e in drawn], dtype=np.int32)
    position = np.zeros(6, dtype=np.int32)
    position[list(BLOCK)] = range(len(BLOCK))
    pairs = RoutedPairs(row, expert, torch.arange(len(drawn)).float())
    order = SortedPairs.from_pairs(pairs, position, n_rows=n_rows, n_experts=len(BLOCK))
    assert order.ends.tolist() == [sum(e <= b for _, e in drawn) for b in BLOCK]
    for r, slots in enumerate(order.slots):
        mine = [s for s in slots.tolist() if s < len(drawn)]
        assert [order.row[s] for s in mine] == [r] * len(mine)
        found = [(int(order.expert[s]), float(order.weight[s])) for s in mine]
        expected = sorted((BLOCK.index(e), float(i)) for i, (x, e) in enumerate(drawn) if x == r)
        assert found == expected


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
def test_rows_that_are_not_aligned_are_not_grouped(
    hidden: int, inter: int, dtype: torch.dtype, fits: bool
) -> None:
    weights = block_of(whole_stacks(SILU, dtype, hidden=hidden, inter=inter))
    assert supports_grouped_mm(weights, CPU) is fits


@pytest.mark.parametrize(("capability", "can"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_an_old_device_multiplies_one_expert_after_the_other(
    capability: tuple[int, int], can: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    weights = block_of(whole_stacks(SILU, torch.bfloat16))
    assert supports_grouped_mm(weights, torch.device("cuda")) is can


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        ((0,), [(0, 1)]),
        ((0, 1, 2), [(0, 3)]),
        ((1, 2, 5, 7, 8), [(1, 2), (5, 1), (7, 2)]),
        ((), []),
    ],
)
def test_consecutive_experts_are_one_piece(
    indices: tuple[int, ...], expected: list[tuple[int, int]]
) -> None:
    assert list(consecutive_runs(indices)) == expected
