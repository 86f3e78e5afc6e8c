"""The gated kernel matches its formula, and pairs are independent of each other."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from faasmoe_expert.functions.kernels import (
    ACTIVATIONS,
    TILE_ROWS,
    KernelSpec,
    RoutedPairs,
    clamped_swiglu,
    gated_per_pair,
    gated_reduced,
)

SILU = KernelSpec("gated", "silu", transposed=False, interleaved=False, bias=False)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECS = [
    pytest.param(
        KernelSpec(name, "gelu", transposed=t, interleaved=i, bias=b), id=f"{name}{t}{i}{b}"
    )
    for name in ("gated", "plain")
    for t in (False, True)
    for i in ((False, True) if name == "gated" else (False,))
    for b in (False, True)
]


def make_weights(
    spec: KernelSpec, *, n_experts: int = 4, hidden: int = 24, inter: int = 20
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, width = ("gate_up_proj", 2 * inter) if spec.name == "gated" else ("up_proj", inter)
    weights = {}
    for name, out_size, in_size in ((first, width, hidden), ("down_proj", hidden, inter)):
        weight = torch.randn(n_experts, out_size, in_size, generator=generator) / in_size**0.5
        weights[name] = weight.transpose(1, 2).contiguous() if spec.transposed else weight
        if spec.bias:
            weights[f"{name}_bias"] = torch.randn(n_experts, out_size, generator=generator)
    return weights


def reference_expert(
    spec: KernelSpec, weights: dict[str, Tensor], expert: int, x: Tensor
) -> Tensor:
    def project(name: str, rows: Tensor) -> Tensor:
        weight = weights[name][expert].double()  # [out, in], or [in, out]
        product = rows @ (weight if spec.transposed else weight.T)  # [n, out]
        return product + weights[f"{name}_bias"][expert].double() if spec.bias else product

    act = ACTIVATIONS[spec.activation]
    if spec.name == "plain":
        return project("down_proj", act(project("up_proj", x.double())))
    projected = project("gate_up_proj", x.double())  # [n, 2I]
    gate, up = (
        (projected[:, 0::2], projected[:, 1::2]) if spec.interleaved else projected.chunk(2, dim=1)
    )
    return project("down_proj", act(gate) * up)


def random_pairs(
    n_rows: int, *, n_experts: int = 4, hidden: int = 24, seed: int = 1
) -> tuple[Tensor, RoutedPairs]:
    """Return random rows with two experts each, unsorted."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n_rows, hidden, generator=generator)  # [T, H]
    expert = torch.rand(n_rows, n_experts, generator=generator).topk(2).indices  # [T, 2]
    weight = torch.rand(n_rows * 2, generator=generator)  # [P]
    pair_row = np.arange(n_rows, dtype=np.int32).repeat(2)
    return rows, RoutedPairs(pair_row, expert.reshape(-1).int().numpy(), weight)


@pytest.mark.parametrize("spec", SPECS)
def test_per_pair_outputs_match_the_reference(spec: KernelSpec) -> None:
    weights = make_weights(spec)
    rows, pairs = random_pairs(13)
    got = gated_per_pair(spec, weights, rows, pairs)  # [P, H]
    for pair, (row, expert) in enumerate(zip(pairs.row, pairs.expert, strict=True)):
        expected = (
            reference_expert(spec, weights, int(expert), rows[row : row + 1])[0]
            * pairs.weight[pair]
        )
        torch.testing.assert_close(got[pair].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_reduced_outputs_are_the_sums_of_pairs(spec: KernelSpec) -> None:
    weights = make_weights(spec)
    rows, pairs = random_pairs(13)
    per_pair = gated_per_pair(spec, weights, rows, pairs)  # [P, H]
    got = gated_reduced(spec, weights, rows, pairs)  # [T, H]
    expected = per_pair.view(13, 2, -1).sum(1)  # [T, H]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_clamped_activation_rounds_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up = (3 * torch.randn(2, 64, 64, generator=generator)).to(dtype)
    got = clamped_swiglu(gate, up, alpha=1.702, limit=7.0)
    exact = clamped_swiglu(gate.float(), up.float(), alpha=1.702, limit=7.0)
    assert got.dtype == dtype
    assert torch.equal(got, exact.to(dtype))


@pytest.mark.parametrize("transposed", [False, True])
def test_bias_is_added_before_the_product_is_rounded(transposed: bool) -> None:
    spec = KernelSpec("plain", "relu", transposed=transposed, interleaved=False, bias=True)
    up, down = torch.ones(1, 1, 2), torch.ones(1, 2, 1)  # [E, out, in]
    weights = {
        "up_proj": up.mT.contiguous() if transposed else up,
        "up_proj_bias": torch.tensor([[-1.0]]),
        "down_proj": down.mT.contiguous() if transposed else down,
        "down_proj_bias": torch.zeros(1, 2),
    }
    weights = {name: weight.bfloat16() for name, weight in weights.items()}
    rows = torch.tensor([[1.0, 2.0**-9]]).bfloat16()  # whose sum would be rounded to 1
    zero = np.zeros(1, dtype=np.int32)
    pairs = RoutedPairs(zero, zero, torch.ones(1))
    for compute in (gated_per_pair, gated_reduced):
        assert compute(spec, weights, rows, pairs).tolist() == [[2.0**-9, 2.0**-9]]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_match_transformers(activation: str) -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(ACTIVATIONS[activation](x), ACT2FN[activation](x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("hidden", "inter"), [(24, 20), (256, 176), (129, 67)])
def test_pair_is_bit_identical_alone_and_in_a_batch(
    dtype: torch.dtype, hidden: int, inter: int
) -> None:
    weights = {
        name: weight.to(dtype)
        for name, weight in make_weights(SILU, hidden=hidden, inter=inter).items()
    }
    rows, pairs = random_pairs(4 * TILE_ROWS + 3, hidden=hidden)
    rows = rows.to(dtype)
    together = gated_per_pair(SILU, weights, rows, pairs)  # [P, H]
    for pair in range(len(pairs)):
        single = RoutedPairs(
            np.zeros(1, np.int32), pairs.expert[pair, None], pairs.weight[pair, None]
        )
        alone = gated_per_pair(SILU, weights, rows[pairs.row[pair], None], single)  # [1, H]
        assert torch.equal(alone[0], together[pair])


@given(st.data())
@settings(max_examples=40)
def test_pair_is_bit_identical_in_any_order_and_selection(data: st.DataObject) -> None:
    weights = make_weights(SILU)
    rows, pairs = random_pairs(2 * TILE_ROWS + 1)
    expected = gated_per_pair(SILU, weights, rows, pairs)  # [P, H]
    chosen = data.draw(st.lists(st.integers(0, len(pairs) - 1), min_size=1, unique=True))
    # Each chosen pair gets its own row, so positions and neighbours differ.
    reordered = RoutedPairs(
        np.arange(len(chosen), dtype=np.int32), pairs.expert[chosen], pairs.weight[chosen]
    )
    reordered_rows = rows[torch.from_numpy(pairs.row[chosen].astype(np.int64))]
    outputs = gated_per_pair(SILU, weights, reordered_rows, reordered)  # [n, H]
    assert torch.equal(outputs, expected[chosen])


def test_repeated_pair_counts_twice() -> None:
    """The pairs of an expert may be as many as rows without covering each row."""
    weights, rows = make_weights(SILU), torch.randn(2, 24)  # [T, H]
    row, expert = np.array([1, 1], dtype=np.int32), np.array([3, 3], dtype=np.int32)
    got = gated_reduced(
        SILU, weights, rows, RoutedPairs(row, expert, torch.tensor([0.5, 0.25]))
    )  # [T, H]
    expected = reference_expert(SILU, weights, 3, rows[1:2])[0] * 0.75
    torch.testing.assert_close(got[1].double(), expected, atol=1e-5, rtol=1e-5)
    assert not got[0].any()


def test_row_without_pairs_is_zero() -> None:
    weights, rows = make_weights(SILU), torch.randn(3, 24)  # [T, H]
    row, expert = np.array([0, 2], dtype=np.int32), np.array([1, 1], dtype=np.int32)
    got = gated_reduced(SILU, weights, rows, RoutedPairs(row, expert, torch.ones(2)))  # [T, H]
    assert not got[1].any()
    assert got[0].any()
    assert got[2].any()


def test_half_precision_sums_are_float32() -> None:
    """Neither sums nor weighted outputs are rounded, only what experts put out."""
    weights = {name: weight.bfloat16() for name, weight in make_weights(SILU).items()}
    rows, pairs = random_pairs(40)
    got = gated_reduced(SILU, weights, rows.bfloat16(), pairs)
    plain = RoutedPairs(pairs.row, pairs.expert, torch.ones(80))
    per_pair = gated_per_pair(SILU, weights, rows.bfloat16(), plain)  # [P, H]
    expected = (per_pair.float() * pairs.weight[:, None]).view(40, 2, -1).sum(1)  # [T, H]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "activation", "message"),
    [
        ("mixture", "silu", "kernel.name: got 'mixture', expected gated or plain"),
        ("gated", "tanh", "kernel.activation: got 'tanh', expected one of"),
    ],
)
def test_rejects_unknown_kernels(name: str, activation: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KernelSpec(name, activation, transposed=False, interleaved=False, bias=False)


def test_kernel_spec_round_trips_through_json() -> None:
    assert KernelSpec.from_json(SILU.to_json()) == SILU
