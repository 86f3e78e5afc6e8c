"""Writers that are the publishers' own packages: GPTQModel, for GPTQ and AWQ, and Model Optimizer.

The packages are those of requirements.txt beside this file (`make test-publishers`). Scales and
zero points are picked here; codes, their packing and the weights that they stand for are theirs.
"""

from typing import Any

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from published.checkpoints import Parts, Write, linears
from published.integers import integers
from torch import Tensor, nn

GROUP = 32
NVFP4_BLOCK = {-1: 16}


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    return linear


def _empty(kind: Any, weight: Tensor, **options: Any) -> Any:
    """Return a quantised layer of the package without content."""
    rows, columns = weight.shape
    options = {"group_size": GROUP, "in_features": columns, "out_features": rows} | options
    return kind(register_buffers=True, **options)


def gptq(*, bits: int = 4, symmetric: bool = True, order: bool = False) -> Write:
    """GPTQModel's GPTQ, in the first checkpoint format."""

    def write(layer: str, weight: Tensor) -> tuple[Parts, Tensor]:
        columns = weight.shape[1]
        permutation = torch.randperm(columns) if order else torch.arange(columns)
        _, scales, zeros, _ = integers(
            weight[:, permutation], bits=bits, group=GROUP, symmetric=symmetric, dtype=torch.float16
        )
        module = _empty(TorchLinear, weight, bits=bits, sym=symmetric, desc_act=order)
        groups = (permutation.argsort() // GROUP).int()
        module.pack_original(_linear(weight), scales.float(), zeros, g_idx=groups)
        parts = {"scales": module.scales, "g_idx": module.g_idx, "qweight": module.qweight}
        module.scales = module.scales.float()  # else weights are rounded to float16
        values = module.dequantize_weight().T
        convert_gptq_v2_to_v1_format_module(module, quantize_config=_Config(bits))
        parts["qzeros"] = module.qzeros
        return {f"{layer}.{name}": tensor.clone() for name, tensor in parts.items()}, values

    return linears(write)


class _Config:
    """What the conversion of zero points asks of a quantize_config."""

    def __init__(self, bits: int) -> None:
        self.bits, self.pack_dtype = bits, torch.int32


def awq(layer: str, weight: Tensor) -> tuple[Parts, Tensor]:
    """AutoAWQ's gemm layout."""
    _, scales, zeros, _ = integers(
        weight, bits=4, group=GROUP, symmetric=False, dtype=torch.float16
    )
    module = _empty(AwqTorchLinear, weight, bits=4, sym=False, desc_act=False)
    module.pack(_linear(weight), scales.half(), zeros)
    parts = {name: getattr(module, name) for name in ("qweight", "qzeros", "scales")}
    values = dequantize_gemm(
        module.qweight, module.qzeros, module.scales.float(), bits=4, group_size=GROUP
    ).T
    return {f"{layer}.{name}": tensor for name, tensor in parts.items()}, values


def nvfp4(layer: str, weight: Tensor) -> tuple[Parts, Tensor]:
    """Model Optimizer's NVFP4."""
    codes, scales, factor = NVFP4QTensor.quantize(weight, block_size=NVFP4_BLOCK[-1])
    values = codes.dequantize(
        dtype=torch.float32, scale=scales, double_scale=factor, block_sizes=NVFP4_BLOCK
    )
    parts = {"weight": codes._quantized_data, "weight_scale": scales, "weight_scale_2": factor}
    return {f"{layer}.{name}": tensor for name, tensor in parts.items()}, values
