"""Writers of integers: GPTQ, AWQ and compressed-tensors; and of NVFP4.

The packing is that of AutoGPTQ's and GPTQModel's `pack`, AutoAWQ's `WQLinear_GEMM.from_linear`,
compressed-tensors' `pack_to_int32` and Model Optimizer's NVFP4 export, element by element.
"""

import torch
from published.checkpoints import Parts, Write, linears
from published.floats import E2M1, E4M3_MAX, groups_of, pack
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def integers(
    weight: Tensor, *, bits: int, group: int, symmetric: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return codes from 0 [N, K], scales and zero points [N, G], and the values [N, K]."""
    groups = groups_of(weight, group)  # [N, G, n]
    largest, middle = (1 << bits) - 1, 1 << (bits - 1)
    if symmetric:
        scales = (groups.abs().amax(-1) / (middle - 0.5)).to(dtype)
        zeros = torch.full(scales.shape, middle)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scales = ((high - low) / largest).to(dtype)
        zeros = (-low / scales.float()).round().clamp(0, largest).int()
    steps = (groups / scales.float()[..., None]).round() + zeros[..., None]
    codes = steps.clamp(0, largest).int()
    values = (codes - zeros[..., None]) * scales.float()[..., None]
    return codes.flatten(-2), scales, zeros.int(), values.flatten(-2)


def words(codes: Tensor, bits: int) -> Tensor:
    """Return int32 [..., K * bits / 32] of codes [..., K], lowest bits first."""
    grouped = groups_of(codes.long(), 32 // bits)
    packed = torch.zeros(grouped.shape[:-1], dtype=torch.int64)
    for position in range(32 // bits):
        packed |= grouped[..., position] << (bits * position)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def gptq(
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    version: int = 1,
    order: bool = False,
) -> Write:
    """GPTQ: `qweight` [K * bits / 32, N], `qzeros`, `scales` and `g_idx`."""

    def write(layer: str, weight: Tensor) -> tuple[Parts, Tensor]:
        n_columns = weight.shape[1]
        permutation = torch.randperm(n_columns) if order else torch.arange(n_columns)
        size = n_columns if group == -1 else group
        codes, scales, zeros, values = integers(
            weight[:, permutation], bits=bits, group=size, symmetric=symmetric, dtype=torch.float16
        )
        inverse = permutation.argsort()
        stored = words(zeros.T.contiguous(), bits)  # [G, N * bits / 32]
        if version == 1:  # as GPTQModel converts the second format: one less in every place
            ones = sum(1 << shift for shift in range(0, 32, bits))
            stored = (stored.long() - ones).to(torch.int32)
        parts = {
            f"{layer}.qweight": words(codes[:, inverse], bits).T,
            f"{layer}.qzeros": stored,
            f"{layer}.scales": scales.T,
            f"{layer}.g_idx": (inverse // size).int(),
        }
        return parts, values[:, inverse]

    return linears(write)


def awq(*, group: int = 32) -> Write:
    """AWQ: `qweight` [K, N / 8] in the order of AWQ_ORDER, `qzeros` and `scales`."""

    def interleaved(codes: Tensor) -> Tensor:
        order = torch.tensor(AWQ_ORDER)
        return words(groups_of(codes, 8)[..., order].flatten(-2), 4)

    def write(layer: str, weight: Tensor) -> tuple[Parts, Tensor]:
        codes, scales, zeros, values = integers(
            weight, bits=4, group=group, symmetric=False, dtype=torch.float16
        )
        parts = {
            f"{layer}.qweight": interleaved(codes.T.contiguous()),
            f"{layer}.qzeros": interleaved(zeros.T.contiguous()),
            f"{layer}.scales": scales.T,
        }
        return parts, values

    return linears(write)


def packed_integers(
    *, bits: int = 4, group: int = 32, symmetric: bool = True, order: bool = False
) -> Write:
    """compressed-tensors' pack-quantized."""

    def write(layer: str, weight: Tensor) -> tuple[Parts, Tensor]:
        n_columns = weight.shape[1]
        size = n_columns if group == -1 else group
        permutation = torch.randperm(n_columns) if order else torch.arange(n_columns)
        codes, scales, zeros, values = integers(
            weight[:, permutation], bits=bits, group=size, symmetric=symmetric, dtype=torch.bfloat16
        )
        inverse = permutation.argsort()
        parts = {
            f"{layer}.weight_packed": words(codes[:, inverse], bits),
            f"{layer}.weight_scale": scales,
            f"{layer}.weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            parts[f"{layer}.weight_zero_point"] = words(zeros.T.contiguous(), bits).T
        if order:
            parts[f"{layer}.weight_g_idx"] = (inverse // size).int()
        return parts, values[:, inverse]

    return linears(write)


def plain_integers(*, group: int = -1, symmetric: bool = True) -> Write:
    """compressed-tensors' int-quantized: int8 codes."""

    def write(layer: str, weight: Tensor) -> tuple[Parts, Tensor]:
        size = weight.shape[1] if group == -1 else group
        codes, scales, zeros, values = integers(
            weight, bits=8, group=size, symmetric=symmetric, dtype=torch.bfloat16
        )
        parts = {
            f"{layer}.weight": (codes - 128).to(torch.int8),
            f"{layer}.weight_scale": scales,
        }
        if not symmetric:
            parts[f"{layer}.weight_zero_point"] = (zeros - 128).to(torch.int8)
        return parts, values

    return linears(write)


def nvfp4(*, is_divisor: bool = False) -> Write:
    """NVFP4: E2M1 with an E4M3 scale per 16 columns and one float32; compressed-tensors divides."""

    def write(layer: str, weight: Tensor) -> tuple[Parts, Tensor]:
        groups = groups_of(weight, 16)  # [N, G, 16]
        factor = weight.abs().amax() / (6 * E4M3_MAX)
        scales = (groups.abs().amax(-1) / 6 / factor).to(torch.float8_e4m3fn)  # [N, G]
        steps = scales.float()[..., None] * factor
        codes = ((groups / steps)[..., None] - E2M1).abs().argmin(-1).to(torch.uint8)
        packed = pack(codes.flatten(-2))
        parts = {f"{layer}.weight_scale": scales, f"{layer}.input_scale": torch.tensor(0.5)}
        if is_divisor:
            divisor = 1 / factor
            parts |= {
                f"{layer}.weight_packed": packed,
                f"{layer}.weight_global_scale": divisor.reshape(1),
            }
            steps = scales.float()[..., None] / divisor
        else:
            parts |= {f"{layer}.weight": packed, f"{layer}.weight_scale_2": factor}
        return parts, (E2M1[codes.long()] * steps).flatten(-2)

    return linears(write)
