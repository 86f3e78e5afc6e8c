"""Checkpoints of NVIDIA's Model Optimizer: NVFP4, fp8 and mxfp8, alone or mixed.

NVFP4: `weight`, uint8 [N, K/2] of E2M1, `weight_scale` E4M3 [N, K/16] and `weight_scale_2`, one
float32. fp8 and mxfp8: `weight` E4M3 with `weight_scale` per tensor, row or block of 128 x 128, or
a power of two per 32 columns. Scales of inputs and of the KV cache are not used.
"""

from __future__ import annotations

from faasmoe_router.checkpoint.formats.block_scaled import MX_BLOCK, BlockScaledWeight, ScaleGrid
from faasmoe_router.checkpoint.formats.checkpoint_tensors import CheckpointTensors
from faasmoe_router.checkpoint.formats.coded_weight import E8M0_DTYPES, FLOAT_SCALE_DTYPES
from faasmoe_router.checkpoint.formats.fp8 import activation_scales, row_or_tensor_block
from faasmoe_router.checkpoint.formats.published import CodedTensor
from faasmoe_router.checkpoint.formats.settings import QuantizationSettings

ALGORITHMS = (
    "nvfp4",
    "w4a16_nvfp4",
    "fp8",
    "fp8_pb_wo",
    "fp8_per_channel_per_token",
    "mxfp8",
    "mixed_precision",
)
_NVFP4_COLUMNS = 16
_FP8_BLOCK = (128, 128)
_WEIGHT_SUFFIX = ".weight"
_SMOOTHING_SUFFIX = ".pre_quant_scale"


def modelopt_weights(
    tensors: CheckpointTensors, settings: QuantizationSettings
) -> list[CodedTensor]:
    """Return the coded weights of a checkpoint of Model Optimizer.

    Raises:
        SourceUnsupported: a field of the settings, or codes or scales are not supported.
    """
    settings.choice("quant_algo", ALGORITHMS, default="mixed_precision")
    columns = _group_size(settings)
    coded: list[CodedTensor] = []
    for name in tensors:
        if name.endswith(_SMOOTHING_SUFFIX):
            raise tensors.error(name, "scales of a weight's inputs (AWQ)", "none")
        if name.endswith(_WEIGHT_SUFFIX) and tensors.dtype(name) in ("U8", "F8_E4M3"):
            is_nvfp4 = tensors.dtype(name) == "U8"
            grid = _nvfp4_grid(tensors, name, columns) if is_nvfp4 else _fp8_grid(tensors, name)
            parts = {name, f"{name}_scale", *activation_scales(name)}
            weight = BlockScaledWeight(tensors, name, grid)
            coded.append(CodedTensor(name, weight, frozenset(parts)))
    return coded


def _group_size(settings: QuantizationSettings) -> int:
    size = settings.fields.get("group_size") or _NVFP4_COLUMNS
    if type(size) is not int or size < 1:
        raise settings.error("group_size", "a positive integer")
    return size


def _nvfp4_grid(tensors: CheckpointTensors, name: str, columns: int) -> ScaleGrid:
    scales, global_scale = f"{name}_scale", f"{name}_scale_2"
    tensors.require(scales, beside=name, dtypes=("F8_E4M3",))
    tensors.require(global_scale, beside=name, dtypes=("F32",))
    return ScaleGrid(scales, (1, columns), global_scale)


def _fp8_grid(tensors: CheckpointTensors, name: str) -> ScaleGrid:
    scales = f"{name}_scale"
    tensors.require(scales, beside=name, dtypes=(*FLOAT_SCALE_DTYPES, *E8M0_DTYPES))
    if tensors.dtype(scales) in E8M0_DTYPES:
        return ScaleGrid(scales, MX_BLOCK)
    n_dimensions = sum(size != 1 for size in tensors.shape(scales))
    is_block = n_dimensions > 1
    return ScaleGrid(scales, _FP8_BLOCK if is_block else row_or_tensor_block(tensors, name, scales))
