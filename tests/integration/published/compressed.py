"""Checkpoints written by the package compressed-tensors, as llm-compressor calls it.

The writer only picks scales and zero points, of the smallest and largest weight that share them;
codes, their packing, names and the config are the package's.
"""

from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from published.checkpoints import Parts, Write, linears
from published.floats import groups_of
from torch import Tensor


def compressed(format: str, **weights: Any) -> tuple[Write, dict[str, Any]]:
    """Return a writer and the `quantization_config` of its checkpoints.

    Args:
        format: the package's name of the format, such as pack-quantized.
        weights: fields of QuantizationArgs.
    """
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format)
    compressor = BaseCompressor.get_value_from_registry(format)

    def write(layer: str, weight: Tensor) -> tuple[Parts, Tensor]:
        written = compressor.compress({"weight": weight, **_parameters(weight, args)}, scheme)
        values = compressor.decompress(written, scheme)["weight"]
        if args.strategy == "tensor_group":  # which decodes to bfloat16
            values = _nvfp4_values(written, args)
        return {f"{layer}.{name}": tensor for name, tensor in written.items()}, values

    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=format,
        ignore=["lm_head", "re:.*gate$"],
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    return linears(write), config.model_dump(mode="json", exclude_none=True)


def _parameters(weight: Tensor, args: QuantizationArgs) -> Parts:
    """Return the scales, zero points and factor of a weight [N, K]."""
    low, high = _ranges(weight, args)
    if args.strategy != "tensor_group":
        scales, zeros = calculate_qparams(low, high, args)
        return {"weight_scale": scales, "weight_zero_point": zeros}
    factor = generate_gparam(weight.amin(), weight.amax())  # [1]
    scales, _ = calculate_qparams(low, high, args, global_scale=factor)
    return {"weight_scale": scales, "weight_global_scale": factor}


def _nvfp4_values(written: Parts, args: QuantizationArgs) -> Tensor:
    """Return the weights of NVFP4 as the package decodes them, in float32."""
    rows, half = written["weight_packed"].shape
    codes = unpack_fp4_from_uint8(written["weight_packed"], rows, 2 * half, dtype=torch.float32)
    values: Tensor = dequantize(
        codes,
        written["weight_scale"].float(),
        args=args,
        dtype=torch.float32,
        global_scale=written["weight_global_scale"],
    )
    return values


def _ranges(weight: Tensor, args: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest of the weights that share a scale."""
    if args.strategy == "tensor":
        return weight.amin(), weight.amax()
    if args.strategy == "block":
        rows, columns = args.block_structure
        n, k = weight.shape[0] // rows, weight.shape[1] // columns
        blocks = weight.view(n, rows, k, columns)
        return blocks.amin((1, 3)), blocks.amax((1, 3))  # [n, k]
    size = args.group_size or weight.shape[1]
    groups = groups_of(weight, size)  # [N, G, n]
    return groups.amin(-1), groups.amax(-1)  # [N, G]
