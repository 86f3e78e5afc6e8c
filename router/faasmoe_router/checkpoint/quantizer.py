"""Quantises weights to the codes and scales of a store. Pure: tensors in, tensors out.

int8 rounds to the nearest multiple of a scale. int4 does too, with the scale that minimises each
group's squared error among a few. mxfp4 rounds to the nearest E2M1 value with a power of two as
scale. int8 is close to lossless; the 4-bit schemes are lossy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from faasmoe_contracts.store import TensorQuantization
from faasmoe_contracts.store.quantization import GROUP_MULTIPLE
from faasmoe_expert.functions.dequantization import E8M0_BIAS, INT4_ZERO, dequantize

CHUNK_ELEMENTS = 1 << 18
"""Weights that are quantised at once, which bounds the memory of intermediate results and fits
the cache."""
SCALE_DTYPE = "bfloat16"
"""Of int8 and int4: the range of float32 in 2 bytes. Codes are rounded for the rounded scale, so
that its few digits cost next to nothing."""
INT4_EXTREMES = (-8.0, -8.5, -7.0, -9.0)
"""Codes that a group's largest weight is tried at, clipped to -8. On normal weights the relative
error is 0.0813; 17 candidates from -9.5 to 9 reach 0.0811, -8 alone (llama.cpp's Q4_0) 0.0860."""


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """Codes and scales of some weights, and what they lost.

    Attributes:
        codes: int8 [..., N, K] or uint8 [..., N, K/2].
        scales: [..., N, G] in the scale type.
        squared_error: sum of the squared differences to the weights.
        squared_norm: sum of the squared weights.
    """

    codes: Tensor
    scales: Tensor
    squared_error: float
    squared_norm: float


def choose_quantization(
    scheme: str, shape: tuple[int, ...], *, transposed: bool
) -> TensorQuantization | None:
    """Return how a parameter is quantised; None if the scheme cannot represent it.

    Groups have 32 columns. Where 32 does not divide K, int8 and int4 have one scale per row, and
    mxfp4 does not apply; nor do 4 bits to an odd K.

    Args:
        scheme: int8, int4 or mxfp4.
        shape: the parameter's, [..., N, K] or, transposed, [..., K, N].
        transposed: whether the parameter is transposed.
    """
    rows, columns = (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
    group = GROUP_MULTIPLE if columns % GROUP_MULTIPLE == 0 else 0
    if (scheme == "mxfp4" and not group) or (scheme != "int8" and columns % 2):
        return None
    scale_dtype = "e8m0" if scheme == "mxfp4" else SCALE_DTYPE
    return TensorQuantization(scheme, (rows, columns), group, scale_dtype, transposed)


def quantize(weights: Tensor, quantization: TensorQuantization) -> QuantizedTensor:
    """Quantise weights, a bounded number at once.

    Args:
        weights: [..., N, K], or [..., K, N] if the quantisation is transposed; any float dtype.
            Fewer rows than the quantisation's N are rows of the whole.
        quantization: the target.
    """
    matrix = weights.transpose(-1, -2) if quantization.transposed else weights  # [..., N, K]
    row_shape, columns = matrix.shape[:-1], matrix.shape[-1]
    (_, code_columns), (_, n_groups) = quantization.codes_shape, quantization.scales_shape
    code_dtype = torch.int8 if quantization.scheme == "int8" else torch.uint8
    codes = torch.empty(*row_shape, code_columns, dtype=code_dtype)
    scales = torch.empty(*row_shape, n_groups, dtype=_SCALE_DTYPES[quantization.scale_dtype])
    flat_codes, flat_scales = codes.view(-1, code_columns), scales.view(-1, n_groups)
    error = norm = 0.0
    start = 0
    untransposed = replace(quantization, transposed=False)
    for chunk in _row_chunks(matrix, max(1, CHUNK_ELEMENTS // columns)):
        groups = chunk.float().view(len(chunk), n_groups, -1)  # [R, G, K / G]
        chunk_codes, chunk_scales = _QUANTIZERS[quantization.scheme](groups)
        end = start + len(chunk)
        flat_codes[start:end], flat_scales[start:end] = chunk_codes, chunk_scales
        result = dequantize(flat_codes[start:end], flat_scales[start:end], untransposed)  # [R, K]
        flat = groups.view(len(chunk), -1)
        error += (result - flat).square().sum(dtype=torch.float64).item()
        norm += flat.square().sum(dtype=torch.float64).item()
        start = end
    return QuantizedTensor(codes, scales, error, norm)


def _row_chunks(matrix: Tensor, n_rows: int) -> list[Tensor]:
    """Return the rows of [..., N, K] in order, contiguous chunks of at most `n_rows` [R, K]."""
    matrices = matrix.unsqueeze(0) if matrix.dim() == 2 else matrix.flatten(0, -3)
    return [chunk for one in matrices for chunk in one.split(n_rows)]


def _quantize_int8(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [R, K] and scales [R, G] of groups [R, G, n]."""
    scales = _round_up(groups.abs().amax(-1) / 127)  # [R, G]
    codes = _multiples(groups, scales).clamp_(-127, 127)
    return codes.to(torch.int8).flatten(1), scales


def _quantize_int4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return packed codes [R, K / 2] and scales [R, G] of groups [R, G, n].

    Each candidate maps the group's largest weight to a code, its sign included; its codes then
    determine the scale with the least squared error.
    """
    position = groups.abs().argmax(-1, keepdim=True)
    extreme = groups.gather(-1, position).squeeze(-1)  # [R, G]
    best_scales = torch.zeros_like(extreme, dtype=torch.bfloat16)
    best_codes = torch.zeros_like(groups)
    best_error = torch.full_like(extreme, torch.inf)
    for code in INT4_EXTREMES:
        codes = _multiples(groups, extreme / code).clamp_(-8, 7)
        scales = _least_squares_scale(groups, codes)
        codes = _multiples(groups, scales).clamp_(-8, 7)
        error = (codes * scales.float()[..., None]).sub_(groups).square_().sum(-1)  # [R, G]
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales = torch.where(better, scales, best_scales)
        best_codes = torch.where(better[..., None], codes, best_codes)
    return _pack_nibbles((best_codes + INT4_ZERO).to(torch.uint8).flatten(1)), best_scales


def _least_squares_scale(groups: Tensor, codes: Tensor) -> Tensor:
    """Return the scales, bfloat16 [R, G], that bring codes closest to the weights."""
    power = codes.square().sum(-1)  # [R, G]
    scales = (groups * codes).sum(-1) / power.clamp(min=1.0)
    return scales.to(torch.bfloat16)


def _quantize_mxfp4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return packed codes [R, K / 2] and scales, e8m0 as uint8 [R, G], of groups [R, G, 32].

    Of the two powers of two around the OCP rule's, the one with the smaller error is taken.
    """
    largest = groups.abs().amax(-1)  # [R, G]
    # frexp: largest = m * 2 ** e with 0.5 <= m < 1, so that E2M1's largest exponent, 2, is e - 1.
    exponent = torch.frexp(largest).exponent - 3  # [R, G]
    candidates = [_encode_mxfp4(groups, exponent + offset) for offset in (0, 1)]
    (low, low_scales, low_error), (high, high_scales, high_error) = candidates
    is_high = high_error < low_error  # [R, G]
    codes = torch.where(is_high[..., None], high, low)
    return _pack_nibbles(codes.flatten(1)), torch.where(is_high, high_scales, low_scales)


def _encode_mxfp4(groups: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes [R, G, n], scales [R, G] and squared errors [R, G] for a scale exponent."""
    scales = (exponent + E8M0_BIAS).clamp(0, 254).to(torch.uint8)
    shift = scales.int() - E8M0_BIAS  # [R, G]
    values = torch.ldexp(groups, -shift[..., None])
    codes, rounded = _nearest_e2m1(values)
    error = rounded.sub_(values).square_().sum(-1)
    return codes, scales, torch.ldexp(error, 2 * shift)


def _nearest_e2m1(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes, uint8, of the nearest E2M1 values, and these; at most 6."""
    size = values.abs().clamp(max=6.0)
    low, middle, high = (size * 2).round_(), size.round(), (size / 2).round_()
    is_low, is_middle = size < 2, size < 4  # steps of 0.5, 1 and 2
    codes = torch.where(is_low, low, torch.where(is_middle, middle + 2, high + 4))
    rounded = torch.where(is_low, low / 2, torch.where(is_middle, middle, high * 2))
    sign = torch.signbit(values).to(torch.uint8) << 3
    return codes.to(torch.uint8) | sign, torch.copysign(rounded, values)


def _multiples(groups: Tensor, scales: Tensor) -> Tensor:
    """Return weights [R, G, n] in units of their scales [R, G], rounded; 0 where the scale is."""
    inverse = torch.where(scales == 0, 0.0, 1 / scales.float())
    return (groups * inverse[..., None]).round_()


def _round_up(scales: Tensor) -> Tensor:
    """Return the next bfloat16 that is not smaller, so that no weight exceeds the largest code."""
    rounded = scales.to(torch.bfloat16)
    infinity = torch.full_like(rounded, torch.inf)
    return torch.where(rounded.float() < scales, torch.nextafter(rounded, infinity), rounded)


def _pack_nibbles(codes: Tensor) -> Tensor:
    """Return [R, K / 2] bytes of 4-bit codes [R, K]: even columns in the low nibbles."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


_QUANTIZERS: Mapping[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "int8": _quantize_int8,
    "int4": _quantize_int4,
    "mxfp4": _quantize_mxfp4,
}
_SCALE_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "e8m0": torch.uint8,
}
