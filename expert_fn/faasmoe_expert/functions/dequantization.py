"""Codes and scales of a store back to weights: the general path where no kernel reads codes.

Knows nothing of files. Products of codes and scales are exact in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
"""Values of the 4-bit floating point numbers of MXFP4, by their code."""
INT4_ZERO = 8
"""Code of zero in int4."""
E8M0_BIAS = 127


def dequantize(codes: Tensor, scales: Tensor, quantization: TensorQuantization) -> Tensor:
    """Return the weights of codes and scales in float32, on their device.

    Args:
        codes: int8 [..., N, K] or uint8 [..., N, K/2].
        scales: [..., N, G] in the scale type; e8m0 as uint8.
        quantization: their scheme.

    Returns:
        [..., N, K], or [..., K, N] if the codes are the transpose of the parameter.
    """
    values = _VALUES[quantization.scheme](codes)  # [..., N, K]
    grouped = values.view(*scales.shape, -1)  # [..., N, G, K / G]
    weights: Tensor = grouped.mul_(scale_values(scales)[..., None]).flatten(-2)  # [..., N, K]
    return weights.transpose(-1, -2) if quantization.transposed else weights


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
}


@dataclass(frozen=True, slots=True)
class QuantizedStack:
    """One quantised parameter of all experts of a layer, in a mapped file.

    Attributes:
        codes: int8 [E, N, K] or uint8 [E, N, K/2].
        scales: [E, N, G].
        quantization: their scheme.
    """

    codes: Tensor
    scales: Tensor
    quantization: TensorQuantization

    def __getitem__(self, expert: int, /) -> Tensor:
        """Return one expert's parameter in float32, dequantised anew by each call."""
        return dequantize(self.codes[expert], self.scales[expert], self.quantization)


@dataclass(frozen=True, slots=True)
class Float32Stack:
    """One parameter of all experts in any dtype, converted to float32 expert by expert."""

    stack: Tensor

    def __getitem__(self, expert: int, /) -> Tensor:
        """Return one expert's parameter in float32."""
        return self.stack[expert].float()
