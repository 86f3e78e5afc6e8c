"""Products with weights of every scheme equal those of the dequantised weights."""

import ctypes
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from kernel_matrices import TORCH_DTYPES, DenseMatrix, random_matrix, run_linear

from faasmoe_kernels import KernelDtype, KernelError, KernelLibrary, Matrix, ParameterDtype, Scheme

TOLERANCE = 1e-4
FLOATS = (Scheme.FLOAT32, Scheme.BFLOAT16, Scheme.FLOAT16)
GROUPS = {
    **dict.fromkeys(FLOATS, (0,)),
    Scheme.INT8: (0, 32, 128),
    Scheme.INT4: (0, 32, 128),
    Scheme.MXFP4: (32,),
    Scheme.FP8: (0, 32, 128),
    Scheme.NVFP4: (16,),
}
FLOAT_PARAMETERS = (ParameterDtype.FLOAT32, ParameterDtype.BFLOAT16, ParameterDtype.FLOAT16)
SCALE_DTYPES = (*FLOAT_PARAMETERS, ParameterDtype.E8M0)
SCHEMES = [(scheme, group) for scheme, groups in GROUPS.items() for group in groups]
ROW_COUNTS = (1, 2, 3, 4, 5, 8, 9, 12, 13, 37)
SHAPES = ((1, 128), (16, 256), (33, 384), (50, 1152))


def valid_depth(scheme: Scheme, group: int, k: int) -> int:
    """Return the nearest k that the scheme can have."""
    if group:
        return max(group, k // group * group)
    return max(2, k // 2 * 2) if scheme is Scheme.INT4 else k


def random_rows(rng: np.random.Generator, rows: int, k: int, dtype: KernelDtype) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal((rows, k))).to(TORCH_DTYPES[dtype])


def expected_product(weight: DenseMatrix, x: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(x.double().numpy() @ weight.values.T + weight.bias)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual.double() - expected).abs().max().item()
    assert error <= TOLERANCE * max(1.0, expected.abs().max().item())


def products_norm(weight: DenseMatrix, x: torch.Tensor) -> torch.Tensor:
    """Return the length of the products that each output sums: what their rounding is relative to.

    All of an output's products may cancel, whatever its own size.
    """
    return torch.from_numpy(np.sqrt(x.double().numpy() ** 2 @ weight.values.T**2))  # [rows, n]


@pytest.mark.parametrize("dtype", KernelDtype)
@pytest.mark.parametrize(("scheme", "group"), SCHEMES)
def test_equals_the_product_of_the_dequantized_weights(
    library: KernelLibrary, rng: np.random.Generator, scheme: Scheme, group: int, dtype: KernelDtype
) -> None:
    for n, k in SHAPES:
        weight = random_matrix(rng, scheme, n, k, group=group)
        for rows in ROW_COUNTS:
            x = random_rows(rng, rows, k, dtype)
            assert_close(run_linear(library, weight.matrix, x), expected_product(weight, x))


@pytest.mark.parametrize("scheme", [*FLOATS, Scheme.INT8, Scheme.INT4, Scheme.FP8])
@pytest.mark.parametrize("k", [2, 6, 14, 34, 62, 98, 130])
def test_columns_behind_the_last_vector_count(
    library: KernelLibrary, rng: np.random.Generator, scheme: Scheme, k: int
) -> None:
    depths = (k,) if scheme is Scheme.INT4 else (k, k - 1)
    for depth in depths:
        weight = random_matrix(rng, scheme, 21, depth, has_bias=True)
        for rows in (1, 3, 20):
            x = random_rows(rng, rows, depth, KernelDtype.BFLOAT16)
            assert_close(run_linear(library, weight.matrix, x), expected_product(weight, x))


@pytest.mark.parametrize("scheme", [Scheme.INT8, Scheme.INT4])
@pytest.mark.parametrize("group", [0, 32, 128])
def test_zero_points_are_subtracted(
    library: KernelLibrary, rng: np.random.Generator, group: int, scheme: Scheme
) -> None:
    for k in (256, 1152):
        weight = random_matrix(rng, scheme, 40, k, group=group, has_zeros=True, has_bias=True)
        for rows in (1, 4, 7, 20):
            x = random_rows(rng, rows, k, KernelDtype.FLOAT32)
            assert_close(run_linear(library, weight.matrix, x), expected_product(weight, x))


@pytest.mark.parametrize(
    ("scheme", "group"),
    [case for case in SCHEMES if case[0] not in (*FLOATS, Scheme.NVFP4)],
    ids=str,
)
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_scales_are_read_as_they_lie_in_a_store(
    library: KernelLibrary,
    rng: np.random.Generator,
    dtype: ParameterDtype,
    scheme: Scheme,
    group: int,
) -> None:
    for k in (384, 32 if group == 32 else 128, 1152):
        weight = random_matrix(rng, scheme, 22, k, group=group, scale_dtype=dtype)
        for rows in (1, 3, 20):
            x = random_rows(rng, rows, k, KernelDtype.FLOAT32)
            assert_close(run_linear(library, weight.matrix, x), expected_product(weight, x))


def test_e8m0_has_no_zero_and_one_nan(library: KernelLibrary) -> None:
    codes = np.arange(256, dtype=np.uint8)  # [n], one scale per row
    ones = np.full((256, 32), 1, dtype=np.int8)
    weight = Matrix(
        Scheme.INT8,
        256,
        32,
        ones.ctypes.data,
        scales=codes.ctypes.data,
        scale_dtype=ParameterDtype.E8M0,
    )
    x = torch.zeros(1, 32)
    x[0, 3] = 1
    actual = run_linear(library, weight, x)[0].numpy()
    assert np.isnan(actual[255])
    np.testing.assert_allclose(actual[:255], 2.0 ** (np.arange(255) - 127), rtol=1e-6)


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("dtype", [*FLOAT_PARAMETERS, ParameterDtype.UINT8])
@pytest.mark.parametrize("scheme", [Scheme.INT8, Scheme.INT4])
def test_zero_points_are_read_as_they_lie_in_a_store(
    library: KernelLibrary,
    rng: np.random.Generator,
    scheme: Scheme,
    dtype: ParameterDtype,
    group: int,
) -> None:
    weight = random_matrix(rng, scheme, 40, 224, group=group, has_zeros=True, zero_dtype=dtype)
    for rows in (1, 20):
        x = random_rows(rng, rows, 224, KernelDtype.BFLOAT16)
        assert_close(run_linear(library, weight.matrix, x), expected_product(weight, x))


@pytest.mark.parametrize("dtype", [ParameterDtype.BFLOAT16, ParameterDtype.FLOAT16])
def test_biases_are_read_as_they_lie_in_a_store(
    library: KernelLibrary, rng: np.random.Generator, dtype: ParameterDtype
) -> None:
    weight = random_matrix(rng, Scheme.BFLOAT16, 41, 96, has_bias=True, bias_dtype=dtype)
    x = random_rows(rng, 3, 96, KernelDtype.BFLOAT16)
    assert_close(run_linear(library, weight.matrix, x), expected_product(weight, x))


@pytest.mark.parametrize(("scheme", "group"), SCHEMES)
def test_a_row_has_the_same_bits_whatever_else_is_computed(
    library: KernelLibrary, rng: np.random.Generator, scheme: Scheme, group: int
) -> None:
    for n, k in ((45, 384), (19, valid_depth(scheme, group, 154)), (35, 2432)):
        weight = random_matrix(rng, scheme, n, k, group=group, has_bias=True)
        x = random_rows(rng, 40, k, KernelDtype.FLOAT32)
        together = run_linear(library, weight.matrix, x)
        for rows in ROW_COUNTS:
            assert torch.equal(run_linear(library, weight.matrix, x[-rows:]), together[-rows:])


@pytest.mark.parametrize(("scheme", "group"), SCHEMES)
def test_the_number_of_threads_changes_no_bit(
    library: KernelLibrary, rng: np.random.Generator, scheme: Scheme, group: int
) -> None:
    weight = random_matrix(rng, scheme, 75, 256, group=group, has_bias=True)
    for rows in (1, 30):
        x = random_rows(rng, rows, 256, KernelDtype.BFLOAT16)
        alone = run_linear(library, weight.matrix, x)
        for n_threads in (2, 3, 64):
            assert torch.equal(run_linear(library, weight.matrix, x, n_threads=n_threads), alone)


@pytest.mark.parametrize("out_dtype", [KernelDtype.BFLOAT16, KernelDtype.FLOAT16])
def test_outputs_are_rounded_once_to_nearest_even(
    library: KernelLibrary, rng: np.random.Generator, out_dtype: KernelDtype
) -> None:
    weight = random_matrix(rng, Scheme.FLOAT32, 64, 64)
    # From subnormal half floats to ones that overflow.
    scale = torch.logspace(-9, 6, 200)[:, None]
    x = random_rows(rng, 200, 64, KernelDtype.FLOAT32) * scale
    exact = run_linear(library, weight.matrix, x)
    rounded = run_linear(library, weight.matrix, x, out_dtype=out_dtype)
    assert torch.equal(rounded, exact.to(TORCH_DTYPES[out_dtype]))


def test_every_half_float_is_read_exactly(library: KernelLibrary) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    identity = torch.eye(1)
    for dtype in (KernelDtype.BFLOAT16, KernelDtype.FLOAT16):
        x = bits.view(TORCH_DTYPES[dtype])[:, None].contiguous()
        weight = random_matrix(np.random.default_rng(0), Scheme.FLOAT32, 1, 1)
        weight.memory[0].copy_(identity)  # type: ignore[attr-defined]
        actual = run_linear(library, weight.matrix, x)
        torch.testing.assert_close(actual, x.float(), rtol=0, atol=0, equal_nan=True)


def test_rows_may_be_strided(library: KernelLibrary, rng: np.random.Generator) -> None:
    weight = random_matrix(rng, Scheme.INT8, 20, 96)
    wide = random_rows(rng, 11, 200, KernelDtype.BFLOAT16)
    x = wide[:, 50:146]
    assert torch.equal(
        run_linear(library, weight.matrix, x), run_linear(library, weight.matrix, x.contiguous())
    )


@pytest.mark.parametrize("k", [96, 1152])
@pytest.mark.parametrize("rows", [2, 30])
def test_a_row_that_is_not_finite_spoils_no_other(
    library: KernelLibrary, rng: np.random.Generator, rows: int, k: int
) -> None:
    weight = random_matrix(rng, Scheme.INT4, 20, k, group=32)
    x = random_rows(rng, rows, k, KernelDtype.FLOAT32)
    clean = run_linear(library, weight.matrix, x)
    x[1, 7] = float("nan")
    spoilt = run_linear(library, weight.matrix, x)
    assert spoilt[1].isnan().all()
    spoilt[1] = clean[1]
    assert torch.equal(spoilt, clean)


@given(data=st.data())
@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_shape_equals_the_reference(library: KernelLibrary, data: st.DataObject) -> None:
    scheme, group = data.draw(st.sampled_from(SCHEMES))
    n, rows = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 30))
    k = valid_depth(scheme, group, data.draw(st.integers(1, 300)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    has_zeros = scheme in (Scheme.INT8, Scheme.INT4) and data.draw(st.booleans())
    weight = random_matrix(
        rng, scheme, n, k, group=group, has_zeros=has_zeros, has_bias=data.draw(st.booleans())
    )
    x = random_rows(rng, rows, k, data.draw(st.sampled_from(KernelDtype)))
    n_threads = data.draw(st.integers(1, 3))
    actual = run_linear(library, weight.matrix, x, n_threads=n_threads)
    error = (actual.double() - expected_product(weight, x)).abs()  # [rows, n]
    assert bool((error <= TOLERANCE * (1 + products_norm(weight, x))).all())


@pytest.mark.parametrize("shift", [0, 1, 3, 8])
@pytest.mark.parametrize(
    ("scheme", "group"),
    [(Scheme.FLOAT32, 0), (Scheme.BFLOAT16, 0), (Scheme.FLOAT16, 0), (Scheme.INT8, 32)],
)
def test_rows_may_lie_in_two_places_at_any_address(
    library: KernelLibrary, rng: np.random.Generator, scheme: Scheme, group: int, shift: int
) -> None:
    n, k = 70, 96
    weight = random_matrix(rng, scheme, n, k, group=group)
    half = n // 2 * k * {Scheme.FLOAT32: 4, Scheme.BFLOAT16: 2, Scheme.FLOAT16: 2}.get(scheme, 1)
    codes = ctypes.string_at(weight.matrix.codes, 2 * half)
    lower, upper = (
        np.frombuffer(bytes(shift) + part, np.uint8) for part in (codes[:half], codes[half:])
    )
    split = replace(
        weight.matrix,
        codes=lower.ctypes.data + shift,
        codes_upper=upper.ctypes.data + shift,
    )
    for rows in (1, 3, 40):
        x = random_rows(rng, rows, k, KernelDtype.BFLOAT16)
        expected = run_linear(library, weight.matrix, x)
        assert torch.equal(run_linear(library, split, x), expected)


def test_rows_in_two_places_are_even_in_number(
    library: KernelLibrary, rng: np.random.Generator
) -> None:
    weight = random_matrix(rng, Scheme.BFLOAT16, 7, 32)
    split = replace(weight.matrix, codes_upper=weight.matrix.codes)
    with pytest.raises(KernelError, match="n: got 7, expected an even number"):
        run_linear(library, split, random_rows(rng, 1, 32, KernelDtype.BFLOAT16))


def test_every_e4m3_code_is_read_exactly(library: KernelLibrary) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0  # NaN, which no store has
    for group in (0, 32):
        scales = torch.ones(256, 1)
        wide = torch.zeros(256, 32, dtype=torch.uint8)
        wide[:, 5] = codes
        weight = Matrix(Scheme.FP8, 256, 32, wide.data_ptr(), scales=scales.data_ptr(), group=group)
        for rows in (1, 40):
            x = torch.zeros(rows, 32)
            x[-1, 5] = 1
            expected = codes.view(torch.float8_e4m3fn).float()
            assert torch.equal(run_linear(library, weight, x)[-1], expected)


@pytest.mark.parametrize("group_rows", [2, 8, 128, 1000])
@pytest.mark.parametrize(("n", "k"), [(1, 96), (130, 128), (140, 200), (257, 320)])
def test_rows_of_fp8_may_share_their_scales(
    library: KernelLibrary, rng: np.random.Generator, n: int, k: int, group_rows: int
) -> None:
    for group in (0, 32, 96, 128):
        weight = random_matrix(rng, Scheme.FP8, n, k, group=group, group_rows=group_rows)
        for rows in (1, 3, 20):
            x = random_rows(rng, rows, k, KernelDtype.BFLOAT16)
            assert_close(run_linear(library, weight.matrix, x), expected_product(weight, x))


@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize(
    ("scheme", "group", "group_rows"),
    [
        (Scheme.FP8, 32, 128),
        (Scheme.NVFP4, 16, 1),
        (Scheme.INT8, 0, 1),
        (Scheme.INT8, 32, 1),
        (Scheme.INT4, 96, 1),
        (Scheme.INT4, 32, 1),
        (Scheme.MXFP4, 32, 1),
    ],
)
def test_scales_may_lie_in_two_places_at_any_address(
    library: KernelLibrary,
    rng: np.random.Generator,
    scheme: Scheme,
    group: int,
    group_rows: int,
    shift: int,
) -> None:
    """As gate and up of a checkpoint do: each begins a group of rows of its own."""
    n, k = 142, 96  # halves of odd n have one factor
    halves = [
        random_matrix(rng, scheme, n // 2, k, group=group, group_rows=group_rows) for _ in range(2)
    ]
    n_code_bytes = n // 2 * k // (1 if scheme in (Scheme.FP8, Scheme.INT8) else 2)
    n_scale_rows = -(-n // 2 // group_rows)
    n_scale_bytes = n_scale_rows * k // (group or k) * (1 if scheme is Scheme.NVFP4 else 4)
    addresses = [
        (half.matrix.codes, n_code_bytes, half.matrix.scales, n_scale_bytes, half.matrix.factors)
        for half in halves
    ]
    copies = [
        tuple(
            np.frombuffer(bytes(shift) + ctypes.string_at(address, size), np.uint8)
            for address, size in ((codes, code_bytes), (scales, scale_bytes), (factor, 4))
            if address
        )
        for codes, code_bytes, scales, scale_bytes, factor in addresses
    ]
    (codes, scales, *factor), (codes_upper, scales_upper, *factor_upper) = (
        [memory.ctypes.data + shift for memory in copy] for copy in copies
    )
    joined = replace(
        halves[0].matrix,
        n=n,
        codes=codes,
        scales=scales,
        codes_upper=codes_upper,
        scales_upper=scales_upper,
        factors=factor[0] if factor else 0,
        factors_upper=factor_upper[0] if factor_upper else 0,
    )
    for rows in (1, 3, 40):
        x = random_rows(rng, rows, k, KernelDtype.BFLOAT16)
        expected = torch.cat([run_linear(library, half.matrix, x) for half in halves], dim=1)
        assert torch.equal(run_linear(library, joined, x), expected)
