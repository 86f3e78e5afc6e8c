"""Blocks of experts equal a float64 reference with the dequantised weights."""

from collections.abc import Callable
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from kernel_matrices import DenseMatrix, library_dtype, random_matrix
from numpy.typing import NDArray
from torch import Tensor
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from faasmoe_kernels import Activation, Gating, KernelLibrary, Matrix, Scheme, matrix_table

TOLERANCE = 1e-4
SCHEMES = [
    (Scheme.FLOAT32, 0),
    (Scheme.BFLOAT16, 0),
    (Scheme.FLOAT16, 0),
    (Scheme.INT8, 0),
    (Scheme.INT8, 32),
    (Scheme.INT4, 32),
    (Scheme.MXFP4, 32),
    (Scheme.FP8, 0),
    (Scheme.FP8, 32),
    (Scheme.NVFP4, 16),
]
ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SILU: F.silu,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Activation.RELU: F.relu,
    Activation.RELU2: lambda x: F.relu(x).square(),
    Activation.SIGMOID: torch.sigmoid,
}
CLAMPED = Gating(Activation.CLAMPED_SWIGLU, interleaved=True, alpha=1.702, limit=0.5)
N_EXPERTS = 5


@dataclass(frozen=True)
class Block:
    """Experts of one layer."""

    first: list[DenseMatrix]
    down: list[DenseMatrix]
    gating: Gating


@dataclass(frozen=True)
class Routing:
    """Pairs of row and expert, sorted by expert."""

    rows: NDArray[np.int64]
    experts: NDArray[np.int64]
    weights: NDArray[np.float32]

    def select(self, row: int) -> "Routing":
        """Return the pairs of one row, which becomes row 0."""
        mine = self.rows == row
        return Routing(self.rows[mine] * 0, self.experts[mine], self.weights[mine])


def random_block(
    rng: np.random.Generator,
    gating: Gating,
    scheme: Scheme = Scheme.BFLOAT16,
    group: int = 0,
    *,
    hidden: int = 64,
    inter: int = 96,
    has_bias: bool = False,
) -> Block:
    def matrices(n: int, k: int) -> list[DenseMatrix]:
        return [
            random_matrix(rng, scheme, n, k, group=group, has_bias=has_bias)
            for _ in range(N_EXPERTS)
        ]

    wide = 2 * inter if gating.is_gated else inter
    return Block(matrices(wide, hidden), matrices(hidden, inter), gating)


def random_routing(rng: np.random.Generator, rows: int, top_k: int = 2) -> Routing:
    experts = np.stack([rng.permutation(N_EXPERTS)[:top_k] for _ in range(rows)]).reshape(-1)
    order = np.argsort(experts, kind="stable")
    row = np.repeat(np.arange(rows), top_k)
    weights = rng.uniform(0, 1, rows * top_k).astype(np.float32)
    return Routing(row[order], experts[order], weights[order])


def random_rows(
    rng: np.random.Generator, rows: int, hidden: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    return torch.from_numpy(rng.standard_normal((rows, hidden))).to(dtype)


def run_experts(
    library: KernelLibrary,
    block: Block,
    x: Tensor,
    routing: Routing,
    *,
    is_reduced: bool = True,
    n_threads: int = 1,
) -> Tensor:
    experts, sizes = np.unique(routing.experts, return_counts=True)
    first = np.frombuffer(matrix_table([block.first[e].matrix for e in experts]), np.uint8)
    down = np.frombuffer(matrix_table([block.down[e].matrix for e in experts]), np.uint8)
    positions = np.arange(len(routing.rows))[::-1].copy()  # an order of its own
    out = torch.empty(len(x) if is_reduced else len(routing.rows), x.shape[1], dtype=x.dtype)
    library.experts(
        first.ctypes.data,
        down.ctypes.data,
        block.gating,
        n_groups=len(experts),
        group_sizes=sizes.ctypes.data,
        pair_rows=routing.rows.ctypes.data,
        pair_positions=0 if is_reduced else positions.ctypes.data,
        pair_weights=routing.weights.ctypes.data,
        x=x.data_ptr(),
        x_dtype=library_dtype(x),
        hidden_size=x.shape[1],
        rows=len(x),
        is_reduced=is_reduced,
        out=out.data_ptr(),
        out_dtype=library_dtype(out),
        n_threads=n_threads,
    )
    return out if is_reduced else out.flip(0)


def expected_pairs(block: Block, x: Tensor, routing: Routing) -> Tensor:
    """Return the weighted output of each pair, float64 [P, H]."""
    results = []
    for hidden, expert, weight in zip(
        expected_hidden(block, x, routing), routing.experts, routing.weights, strict=True
    ):
        down = block.down[expert]
        results.append(torch.from_numpy(down.values @ hidden.numpy() + down.bias) * float(weight))
    return torch.stack(results)


def expected_hidden(block: Block, x: Tensor, routing: Routing) -> Tensor:
    """Return the input of each pair's down projection, float64 [P, I]."""
    products = [
        torch.from_numpy(
            block.first[expert].values @ x[row].double().numpy() + block.first[expert].bias
        )
        for row, expert in zip(routing.rows, routing.experts, strict=True)
    ]
    return torch.stack([expected_gating(block.gating, product) for product in products])


def expected_gating(gating: Gating, product: Tensor) -> Tensor:
    """Return the input of the down projection, [I]."""
    if not gating.is_gated:
        return ACTIVATIONS[gating.activation](product)
    gate, up = (product[::2], product[1::2]) if gating.interleaved else product.chunk(2)
    if gating.activation is Activation.CLAMPED_SWIGLU:  # as GPT-OSS computes it
        gate, up = gate.clamp(max=gating.limit), up.clamp(-gating.limit, gating.limit)
        return (up + 1) * gate * torch.sigmoid(gating.alpha * gate)
    return ACTIVATIONS[gating.activation](gate) * up


def reduce_pairs(pairs: Tensor, routing: Routing, rows: int) -> Tensor:
    total = torch.zeros(rows, pairs.shape[1], dtype=torch.float64)
    return total.index_add_(0, torch.from_numpy(routing.rows), pairs)


def assert_close(actual: Tensor, expected: Tensor, *, of_terms: float = 0.0) -> None:
    """Compare to 1e-4 of the largest output, or of what is summed, which may cancel."""
    magnitude = max(1.0, expected.abs().max().item(), of_terms)
    assert (actual.double() - expected).abs().max().item() <= TOLERANCE * magnitude


@pytest.mark.parametrize(
    "gating",
    [
        CLAMPED,
        *(
            Gating(activation, is_gated=is_gated, interleaved=interleaved)
            for activation in ACTIVATIONS
            for is_gated, interleaved in ((True, False), (True, True), (False, False))
        ),
    ],
    ids=lambda g: f"{g.activation.name}-{'gated' if g.is_gated else 'plain'}-{g.interleaved:d}",
)
def test_every_activation_equals_the_reference(
    library: KernelLibrary, rng: np.random.Generator, gating: Gating
) -> None:
    block = random_block(rng, gating, inter=37, has_bias=True)
    x, routing = random_rows(rng, 12, 64) * 3, random_routing(rng, 12)
    pairs = expected_pairs(block, x, routing)
    assert_close(run_experts(library, block, x, routing), reduce_pairs(pairs, routing, 12))
    assert_close(run_experts(library, block, x, routing, is_reduced=False), pairs)


@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize(("scheme", "group"), SCHEMES)
def test_every_scheme_equals_the_reference(
    library: KernelLibrary, rng: np.random.Generator, scheme: Scheme, group: int, rows: int
) -> None:
    block = random_block(rng, Gating(Activation.SILU), scheme, group)
    x, routing = random_rows(rng, rows, 64), random_routing(rng, rows)
    expected = reduce_pairs(expected_pairs(block, x, routing), routing, rows)
    assert_close(run_experts(library, block, x, routing), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_are_rounded_once_to_the_type_of_the_inputs(
    library: KernelLibrary, rng: np.random.Generator, dtype: torch.dtype
) -> None:
    block = random_block(rng, Gating(Activation.SILU))
    x, routing = random_rows(rng, 20, 64, dtype), random_routing(rng, 20)
    for is_reduced in (True, False):
        exact = run_experts(library, block, x.float(), routing, is_reduced=is_reduced)
        rounded = run_experts(library, block, x, routing, is_reduced=is_reduced)
        assert torch.equal(rounded, exact.to(dtype))


@pytest.mark.parametrize(("scheme", "group"), SCHEMES)
@pytest.mark.parametrize("is_reduced", [True, False])
def test_a_row_has_the_same_bits_alone_and_among_others(
    library: KernelLibrary,
    rng: np.random.Generator,
    scheme: Scheme,
    group: int,
    is_reduced: bool,
) -> None:
    block = random_block(rng, Gating(Activation.SILU), scheme, group)
    x, routing = random_rows(rng, 50, 64), random_routing(rng, 50)
    together = run_experts(library, block, x, routing, is_reduced=is_reduced)
    for row in (0, 7, 49):
        alone = run_experts(
            library, block, x[row : row + 1], routing.select(row), is_reduced=is_reduced
        )
        expected = together[row : row + 1] if is_reduced else together[routing.rows == row]
        assert torch.equal(alone, expected)


def test_the_number_of_threads_changes_no_bit(
    library: KernelLibrary, rng: np.random.Generator
) -> None:
    block = random_block(rng, Gating(Activation.SILU), Scheme.INT8)
    x, routing = random_rows(rng, 30, 64), random_routing(rng, 30)
    alone = run_experts(library, block, x, routing)
    for n_threads in (2, 5):
        assert torch.equal(run_experts(library, block, x, routing, n_threads=n_threads), alone)


def stored_matrix(weight: Tensor, bias: Tensor) -> DenseMatrix:
    """Return transformers' [in, out] weight as a matrix [out, in] of the library."""
    codes, bias = weight.detach().T.contiguous(), bias.detach().contiguous()
    n, k = codes.shape
    matrix = Matrix(Scheme.FLOAT32, n, k, codes.data_ptr(), bias=bias.data_ptr())
    return DenseMatrix(matrix, codes.double().numpy(), bias.double().numpy(), (codes, bias))


@pytest.mark.parametrize("rows", [1, 7])
def test_the_clamped_swiglu_equals_transformers_gpt_oss(
    library: KernelLibrary, rng: np.random.Generator, rows: int
) -> None:
    config = GptOssConfig(
        hidden_size=64,
        intermediate_size=96,
        num_local_experts=N_EXPERTS,
        num_experts_per_tok=2,
        experts_implementation="eager",
    )
    experts = GptOssExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # gates and ups beyond the limit of 7
    block = Block(
        list(map(stored_matrix, experts.gate_up_proj, experts.gate_up_proj_bias)),
        list(map(stored_matrix, experts.down_proj, experts.down_proj_bias)),
        Gating(
            Activation.CLAMPED_SWIGLU,
            interleaved=True,
            alpha=experts.alpha,
            limit=experts.limit,
        ),
    )
    x, routing = random_rows(rng, rows, 64) * 3, random_routing(rng, rows)
    by_row = [routing.rows == row for row in range(rows)]
    index = torch.from_numpy(np.stack([routing.experts[mine] for mine in by_row]))  # [rows, 2]
    weights = torch.from_numpy(np.stack([routing.weights[mine] for mine in by_row]))  # [rows, 2]
    with torch.no_grad():
        expected = experts.double()(x.double(), index, weights.double())
    assert expected.abs().max() > 1
    assert_close(run_experts(library, block, x, routing), expected)


def test_rows_without_pairs_are_zero(library: KernelLibrary, rng: np.random.Generator) -> None:
    block = random_block(rng, Gating(Activation.SILU))
    routing = random_routing(rng, 3)
    out = run_experts(library, block, random_rows(rng, 5, 64), routing)
    assert not out[3:].any()
    assert out[:3].any()


@given(data=st.data())
@settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_block_equals_the_reference(library: KernelLibrary, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    scheme, group = data.draw(st.sampled_from(SCHEMES))
    step = group or 2
    gating = Gating(
        data.draw(st.sampled_from(list(ACTIVATIONS))),
        is_gated=data.draw(st.booleans()),
        interleaved=data.draw(st.booleans()),
    )
    block = random_block(
        rng,
        gating,
        scheme,
        group,
        hidden=step * data.draw(st.integers(1, 128 // step)),
        inter=step * data.draw(st.integers(1, 128 // step)),
        has_bias=data.draw(st.booleans()),
    )
    rows = data.draw(st.integers(1, 30))
    x = random_rows(rng, rows, block.down[0].matrix.n)
    routing = random_routing(rng, rows, data.draw(st.integers(1, N_EXPERTS)))
    expected = expected_pairs(block, x, routing)
    actual = run_experts(library, block, x, routing, is_reduced=False)
    of_terms = expected_hidden(block, x, routing).abs().sum(dim=1).max().item()
    assert_close(actual, expected, of_terms=of_terms)
