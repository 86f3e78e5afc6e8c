"""Codes and scales of a store back to weights: the general path where no kernel reads codes.

Knows nothing of files. Products of codes and scales are exact in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from faasmoe_contracts.store import TensorQuantization

E2M1_VALUES = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    -0.0,
    -0.5,
    -1.0,
    -1.5,
    -2.0,
    -3.0,
    -4.0,
    -6.0,
)
"""Values of the 4-bit floating point numbers of MXFP4 and NVFP4, by their code."""
INT4_ZERO = 8
"""Code of zero in int4."""
_MIDDLES: Mapping[str, int] = {"int8": 128, "int4": INT4_ZERO}
"""The zero point that stands for none: codes counted from 0 are around it."""
E8M0_BIAS = 127


def dequantize(
    codes: Tensor,
    scales: Tensor,
    quantization: TensorQuantization,
    *,
    zeros: Tensor | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    """Return the weights of codes and scales in float32, on their device.

    Args:
        codes: int8, uint8 or E4M3 [..., N, K], or uint8 [..., N, K/2].
        scales: [..., N, G] in the scale type, or of fewer rows; e8m0 as uint8.
        quantization: their scheme.
        zeros: zero points, uint8 [..., N, G]; None if the scheme is symmetric.
        factors: what the scales of the rows' parts are multiplied by, float32 [..., P, 1]; None if
            the scheme has none.

    Returns:
        [..., N, K], or [..., K, N] if the codes are the transpose of the parameter.
    """
    values = _VALUES[quantization.scheme](codes)  # [..., N, K]
    n_rows = values.shape[-2]
    per_row = scale_values(scales)  # [..., N, G], or of fewer rows
    if quantization.group_rows > 1:
        per_row = _repeat_rows(per_row, quantization, n_rows)
    if factors is not None:
        per_row = per_row * factors.repeat_interleave(n_rows // quantization.parts, -2)
    if zeros is not None:
        offsets = zeros.float() - _MIDDLES[quantization.scheme]  # [..., N, G]
        values = _grouped(values, quantization).sub_(offsets[..., None]).flatten(-2)
    columns = values.shape[-1]
    if quantization.group and columns % quantization.group:
        weights = values.mul_(per_row.repeat_interleave(quantization.group, -1)[..., :columns])
    else:
        weights = _grouped(values, quantization).mul_(per_row[..., None]).flatten(-2)
    return weights.transpose(-1, -2) if quantization.transposed else weights


def _grouped(values: Tensor, quantization: TensorQuantization) -> Tensor:
    """Return a view [..., N, G, K / G] of values [..., N, K]."""
    return values.view(*values.shape[:-1], -1, quantization.group or values.shape[-1])


def _repeat_rows(scales: Tensor, quantization: TensorQuantization, n_rows: int) -> Tensor:
    """Return the scales of each row, [..., N, G], of those that rows share, part by part."""
    *leading, _, n_groups = scales.shape
    by_part = scales.reshape(*leading, quantization.parts, -1, n_groups)  # [..., P, scale rows, G]
    repeated = by_part.repeat_interleave(quantization.group_rows, -2)
    return repeated[..., : n_rows // quantization.parts, :].flatten(-3, -2)


def scale_values(scales: Tensor) -> Tensor:
    """Return scales as float32, of the same shape; uint8 scales are e8m0."""
    if scales.dtype is torch.uint8:
        exponents = scales.int() - E8M0_BIAS
        return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
    return scales.float()


def _nibble_values(codes: Tensor, values: Sequence[float]) -> Tensor:
    """Return the values [..., K] of 4-bit codes [..., K/2]: low nibbles are even columns.

    Looks up both values of a byte at once.
    """
    one = torch.tensor(values, dtype=torch.float32, device=codes.device)  # [16]
    byte = torch.arange(256, device=codes.device)
    table = torch.stack((one[byte & 15], one[byte >> 4]), dim=-1)  # [256, 2]
    return F.embedding(codes.int(), table).flatten(-2)


_VALUES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "int8": lambda codes: codes.float(),
    "int4": lambda codes: _nibble_values(codes, range(-INT4_ZERO, 16 - INT4_ZERO)),
    "mxfp4": lambda codes: _nibble_values(codes, E2M1_VALUES),
    "fp8": lambda codes: codes.view(torch.float8_e4m3fn).float(),
    "nvfp4": lambda codes: _nibble_values(codes, E2M1_VALUES),
}
