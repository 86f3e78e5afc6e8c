"""Random weight matrices for the kernel library, with the dense values that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from faasmoe_kernels import KernelDtype, KernelLibrary, Matrix, ParameterDtype, Scheme

Array = NDArray[Any]

TORCH_DTYPES = {
    KernelDtype.FLOAT32: torch.float32,
    KernelDtype.BFLOAT16: torch.bfloat16,
    KernelDtype.FLOAT16: torch.float16,
}
FLOAT_DTYPES = {
    Scheme.FLOAT32: torch.float32,
    Scheme.BFLOAT16: torch.bfloat16,
    Scheme.FLOAT16: torch.float16,
}
FLOAT_PARAMETERS = {
    ParameterDtype.FLOAT32: torch.float32,
    ParameterDtype.BFLOAT16: torch.bfloat16,
    ParameterDtype.FLOAT16: torch.float16,
    ParameterDtype.E4M3: torch.float8_e4m3fn,
}
E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@dataclass(frozen=True)
class DenseMatrix:
    """A matrix as the library takes it, and its values.

    Attributes:
        matrix: descriptor with the addresses of `memory`.
        values: dequantised weights, float64 [n, k].
        bias: float64 [n]; zeros without a bias.
        memory: what the addresses point into.
    """

    matrix: Matrix
    values: Array
    bias: Array
    memory: tuple[object, ...]


def random_matrix(
    rng: np.random.Generator,
    scheme: Scheme,
    n: int,
    k: int,
    *,
    group: int = 0,
    has_zeros: bool = False,
    has_bias: bool = False,
    scale_dtype: ParameterDtype = ParameterDtype.FLOAT32,
    zero_dtype: ParameterDtype = ParameterDtype.FLOAT32,
    bias_dtype: ParameterDtype = ParameterDtype.FLOAT32,
    group_rows: int = 1,
) -> DenseMatrix:
    """Return a matrix [n, k] whose products with unit inputs are about 1.

    `group_rows` rows of FP8 share their scales; NVFP4 has a factor for each half of an even n.
    """
    if scheme is Scheme.NVFP4:
        scale_dtype = ParameterDtype.E4M3
    bias = rng.standard_normal(n).astype(np.float32) if has_bias else None  # [n]
    stored_bias, bias = _stored(bias, bias_dtype)
    codes: torch.Tensor | Array
    levels: Array
    scales: Array | None = None
    zeros: Array | None = None
    stored_scales = stored_zeros = None
    factors: Array | None = None
    if scheme in FLOAT_DTYPES:
        weights = torch.from_numpy(rng.standard_normal((n, k)) / k**0.5).to(FLOAT_DTYPES[scheme])
        codes, values = weights, weights.double().numpy()  # [n, k]
    else:
        n_groups = -(-k // group) if group else 1
        n_scaled = -(-n // group_rows)
        scales = (rng.uniform(0.5, 1.5, (n_scaled, n_groups)) / k**0.5).astype(np.float32)  # [n, G]
        if scheme is Scheme.INT8:
            scales /= 64
            codes = rng.integers(-128, 128, (n, k)).astype(np.int8)
            if has_zeros:
                zeros = rng.integers(0, 256, (n, n_groups)).astype(np.float32)  # [n, G]
            levels = codes + (0.0 if zeros is None else 128 - _spread(zeros, k, group))
        elif scheme is Scheme.FP8:
            scales /= 256
            codes = rng.integers(0, 256, (n, k), dtype=np.uint8)
            codes[(codes & 0x7F) == 0x7F] = 0  # NaN
            levels = torch.from_numpy(codes).view(torch.float8_e4m3fn).double().numpy()
        else:
            nibbles = rng.integers(0, 16, (n, k), dtype=np.uint8)
            codes = nibbles[:, ::2] | nibbles[:, 1::2] << 4  # [n, k / 2]
            if scheme is Scheme.INT4:
                scales /= 4
                if has_zeros:
                    zeros = rng.integers(0, 16, (n, n_groups)).astype(np.float32)  # [n, G]
                levels = nibbles - (8.0 if zeros is None else _spread(zeros, k, group))
            else:
                scales /= 3
                levels = E2M1_VALUES[nibbles & 7] * np.where(nibbles & 8, -1, 1)
        if scheme is Scheme.NVFP4:
            factors = np.array([0.25, 0.75 if n % 2 == 0 else 0.25], dtype=np.float32) / k**0.5
            scales *= k**0.5 * 448 / 1.5
            factors /= 448 / 1.5
        stored_scales, scales = _stored(scales, scale_dtype)
        stored_zeros, zeros = _stored(zeros, zero_dtype)
        assert scales is not None
        scales = np.repeat(scales, group_rows, axis=0)[:n]
        values = levels * _spread(scales, k, group)
        if factors is not None:
            values *= np.repeat(factors.astype(np.float64), [n // 2, n - n // 2])[:, None]
    matrix = Matrix(
        scheme,
        n,
        k,
        _address(codes),
        scales=_address(stored_scales),
        zeros=_address(stored_zeros),
        bias=_address(stored_bias),
        group=group,
        scale_dtype=scale_dtype,
        zero_dtype=zero_dtype,
        bias_dtype=bias_dtype,
        group_rows=group_rows if group_rows > 1 else 0,
        factors=_address(factors),
        factors_upper=_address(factors) + 4 if factors is not None and n % 2 == 0 else 0,
    )
    dense_bias = np.zeros(n) if bias is None else bias.astype(np.float64)
    return DenseMatrix(
        matrix, values, dense_bias, (codes, stored_scales, stored_zeros, stored_bias, factors)
    )


def run_linear(
    library: KernelLibrary,
    weight: Matrix,
    x: torch.Tensor,
    *,
    out_dtype: KernelDtype = KernelDtype.FLOAT32,
    n_threads: int = 1,
) -> torch.Tensor:
    """Return x @ weight.T (+ bias) in `out_dtype`, [rows, n]; rows of `x` may be strided."""
    out = torch.empty(x.shape[0], weight.n, dtype=TORCH_DTYPES[out_dtype])
    library.linear(
        weight,
        x=x.data_ptr(),
        x_dtype=library_dtype(x),
        x_stride=x.stride(0),
        rows=x.shape[0],
        out=out.data_ptr(),
        out_dtype=out_dtype,
        n_threads=n_threads,
    )
    return out


def library_dtype(x: torch.Tensor) -> KernelDtype:
    """Return the library's name of a tensor's dtype."""
    return next(dtype for dtype, torch_dtype in TORCH_DTYPES.items() if torch_dtype is x.dtype)


def _stored(
    values: Array | None, dtype: ParameterDtype
) -> tuple[torch.Tensor | None, Array | None]:
    """Return parameters in memory as `dtype`, and the values that they then have."""
    if values is None:
        return None, None
    if dtype is ParameterDtype.E8M0:
        codes = np.round(np.log2(values)) + 127
        return torch.from_numpy(codes.astype(np.uint8)), 2.0 ** (codes - 127)
    torch_dtype = torch.uint8 if dtype is ParameterDtype.UINT8 else FLOAT_PARAMETERS[dtype]
    stored = torch.from_numpy(values).to(torch_dtype)
    return stored, stored.double().numpy()


def _spread(per_group: Array, k: int, group: int) -> Array:
    """Return values [n, k] from one value per group, [n, G]."""
    return np.repeat(per_group.astype(np.float64), group or k, axis=1)[:, :k]


def _address(memory: torch.Tensor | Array | None) -> int:
    if memory is None:
        return 0
    return memory.data_ptr() if isinstance(memory, torch.Tensor) else memory.ctypes.data
