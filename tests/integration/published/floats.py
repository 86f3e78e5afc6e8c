"""Writers of 8- and 4-bit floats: fp8, mxfp8, mxfp4 and fp4 experts.

As DeepSeek's `fp8_cast`, OCP's MX specification and OpenAI's GPT-OSS write them.
"""

import torch
from published.checkpoints import Parts, Write, linears
from torch import Tensor

E4M3_MAX = 448.0
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = torch.tensor([*_POSITIVE, *(-value for value in _POSITIVE)])


def fp8_blocks(*, block: int = 128, suffix: str = "weight_scale_inv") -> Write:
    """DeepSeek-V3, Qwen3 FP8: E4M3 with a float32 scale per block x block."""

    def write(layer: str, weight: Tensor) -> tuple[Parts, Tensor]:
        rows, columns = weight.shape
        n, k = -(-rows // block), -(-columns // block)
        padded = torch.zeros(n * block, k * block)
        padded[:rows, :columns] = weight
        blocks = padded.view(n, block, k, block)
        scales = blocks.abs().amax((1, 3)) / E4M3_MAX  # [n, k]
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        values = (codes.float() * scales[:, None, :, None]).view(n * block, k * block)
        codes = codes.view(n * block, k * block)[:rows, :columns]
        parts = {f"{layer}.weight": codes, f"{layer}.{suffix}": scales}
        return parts, values[:rows, :columns]

    return linears(write)


def fp8_scaled(
    per: str, *, suffix: str = "weight_scale", dtype: torch.dtype = torch.float32
) -> Write:
    """fp8 with one scale per "row" [N, 1] or "tensor" []."""

    def write(layer: str, weight: Tensor) -> tuple[Parts, Tensor]:
        largest = weight.abs().amax(1, keepdim=True) if per == "row" else weight.abs().amax()
        scales = (largest / E4M3_MAX).to(dtype)
        codes = (weight / scales.float()).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        parts = {
            f"{layer}.weight": codes,
            f"{layer}.{suffix}": scales,
            f"{layer}.input_scale": torch.tensor(0.5),
        }
        return parts, codes.float() * scales.float()

    return linears(write)


def mxfp8(*, suffix: str = "weight_scale_inv", dtype: torch.dtype = torch.uint8) -> Write:
    """E4M3 with a power of two per 32 columns, as uint8 or float8_e8m0fnu."""

    def write(layer: str, weight: Tensor) -> tuple[Parts, Tensor]:
        groups = groups_of(weight, 32)  # [N, G, 32]
        exponents = power_of_two(groups, largest_exponent=8)  # [N, G]
        factors = 2.0 ** exponents[..., None]
        codes = (groups / factors).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        parts = {
            f"{layer}.weight": codes.flatten(-2),
            f"{layer}.{suffix}": (exponents + 127).to(torch.uint8).view(dtype),
        }
        return parts, (codes.float() * factors).flatten(-2)

    return linears(write)


def deepseek_v4() -> Write:
    """Experts in packed E2M1 with a power of two per 32 columns, other layers in fp8 blocks."""
    dense = fp8_blocks(suffix="scale")

    def write_expert(layer: str, weight: Tensor) -> tuple[Parts, Tensor]:
        codes, exponents, values = mxfp4_groups(groups_of(weight, 32))
        scales = (exponents + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
        packed = pack(codes.flatten(-2)).view(torch.int8)
        return {f"{layer}.weight": packed, f"{layer}.scale": scales}, values.flatten(-2)

    expert = linears(write_expert)
    return lambda name, weight: (expert if ".experts." in name else dense)(name, weight)


def gpt_oss() -> Write:
    """GPT-OSS: stacked experts [E, K, N] as blocks [E, N, K/32, 16] and scales [E, N, K/32]."""

    def write(name: str, weight: Tensor) -> tuple[Parts, Tensor] | None:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return None
        groups = groups_of(weight.transpose(1, 2), 32)  # [E, N, G, 32]
        codes, exponents, values = mxfp4_groups(groups)
        parts = {
            f"{name}_blocks": pack(codes),
            f"{name}_scales": (exponents + 127).to(torch.uint8),
        }
        return parts, values.flatten(-2).transpose(1, 2)

    return write


def mxfp4_groups(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes [..., n], exponents [...] and values [..., n] of groups [..., n]."""
    exponents = power_of_two(groups, largest_exponent=2)
    factors = 2.0 ** exponents[..., None]
    codes = ((groups / factors)[..., None] - E2M1).abs().argmin(-1)
    return codes.to(torch.uint8), exponents, E2M1[codes] * factors


def power_of_two(groups: Tensor, *, largest_exponent: int) -> Tensor:
    """Return the exponent of the scale of each group [..., n], by the OCP rule, [...]."""
    return groups.abs().amax(-1).log2().floor() - largest_exponent


def groups_of(weight: Tensor, n_columns: int) -> Tensor:
    """Return a weight [..., K] in groups [..., G, n_columns]."""
    return weight.reshape(*weight.shape[:-1], -1, n_columns)


def pack(codes: Tensor) -> Tensor:
    """Return [..., n / 2] bytes of 4-bit codes [..., n], the even ones in the low nibbles."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)
