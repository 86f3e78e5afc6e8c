"""Checkpoints in fp8: DeepSeek, Qwen FP8 and others; mxfp8; fp8 with 4-bit experts.

A weight `X.weight` of E4M3 codes has its scales in `X.weight_scale_inv`, or by another of the names
below: float32 or powers of two, per block, row or tensor. With `expert_dtype: fp4` (DeepSeek V4),
experts are packed E2M1 with a power of two per 32 columns. Scales of activations are not used:
activations are not quantised.
"""

from __future__ import annotations

import math

from faasmoe_router.checkpoint.formats.block_scaled import (
    MX_BLOCK,
    BlockScaledWeight,
    ScaleGrid,
)
from faasmoe_router.checkpoint.formats.checkpoint_tensors import CheckpointTensors
from faasmoe_router.checkpoint.formats.coded_weight import E8M0_DTYPES, FLOAT_SCALE_DTYPES
from faasmoe_router.checkpoint.formats.published import CodedTensor
from faasmoe_router.checkpoint.formats.settings import QuantizationSettings

_BLOCK = (128, 128)
_WEIGHT_SUFFIX = ".weight"
_ACTIVATION_SUFFIXES = (".input_scale", ".activation_scale", ".qscale_act", ".weight_scale_2")
_UNSUPPORTED_DTYPES = ("F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")


def fp8_weights(tensors: CheckpointTensors, settings: QuantizationSettings) -> list[CodedTensor]:
    """Return the coded weights of a checkpoint in fp8.

    Raises:
        SourceUnsupported: a field of the settings, or codes or scales are not supported.
    """
    is_fp4 = settings.choice("expert_dtype", ("fp8", "fp4"), default="fp8") == "fp4"
    block = _block_size(settings)
    return [
        _coded_tensor(tensors, name, MX_BLOCK if tensors.dtype(name) == "I8" else block)
        for name in tensors
        if _is_coded(tensors, name, is_fp4=is_fp4)
    ]


def _block_size(settings: QuantizationSettings) -> tuple[int, int] | None:
    """Return rows and columns per scale; None for one per row or tensor."""
    default = {"fp8": _BLOCK, "mxfp8": MX_BLOCK}.get(settings.method)
    value = settings.fields.get("weight_block_size", default)
    if value is None:
        return None
    is_valid = isinstance(value, list | tuple) and all(type(n) is int and n > 0 for n in value)
    if not is_valid or len(value) != 2:
        raise settings.error("weight_block_size", "two positive integers or null")
    return value[0], value[1]


def _is_coded(tensors: CheckpointTensors, name: str, *, is_fp4: bool) -> bool:
    dtype = tensors.dtype(name)
    if dtype in _UNSUPPORTED_DTYPES:
        raise tensors.error(name, f"dtype {dtype}", "F8_E4M3")
    if len(tensors.shape(name)) < 2 or name.endswith("_scale"):
        return False
    return dtype == "F8_E4M3" or (is_fp4 and dtype == "I8" and name.endswith(_WEIGHT_SUFFIX))


def _coded_tensor(
    tensors: CheckpointTensors, name: str, block: tuple[int, int] | None
) -> CodedTensor:
    scales_name = scale_name(tensors, name)
    if block is None:
        block = row_or_tensor_block(tensors, name, scales_name)
    weight = BlockScaledWeight(tensors, name, ScaleGrid(scales_name, block))
    return CodedTensor(name, weight, frozenset({name, scales_name, *activation_scales(name)}))


def scale_name(tensors: CheckpointTensors, name: str) -> str:
    """Return the name of the scales of a weight; raises SourceUnsupported if there are none."""
    module = name.removesuffix(_WEIGHT_SUFFIX)
    names = [f"{name}_scale_inv", f"{name}_scale"]
    if name.endswith(_WEIGHT_SUFFIX):
        names += [f"{module}.scale", f"{module}.qscale_weight"]
    found = next((candidate for candidate in names if candidate in tensors), None)
    tensors.require(found or names[0], beside=name, dtypes=(*FLOAT_SCALE_DTYPES, *E8M0_DTYPES))
    return found or names[0]


def row_or_tensor_block(tensors: CheckpointTensors, name: str, scales_name: str) -> tuple[int, int]:
    """Return the block of a scale per tensor, if there is just one, or else per row."""
    shape = tensors.shape(name)
    if len(shape) < 2:
        raise tensors.error(name, f"shape {shape}", "rows and columns")
    n_rows, n_columns = shape[-2:]
    n_scales = math.prod(tensors.shape(scales_name))
    return (n_rows, n_columns) if n_scales == 1 else (1, n_columns)


def activation_scales(name: str) -> list[str]:
    """Return the names that scales of a weight's inputs may have, which are not used."""
    module = name.removesuffix(_WEIGHT_SUFFIX)
    return [f"{module}{suffix}" for suffix in _ACTIVATION_SUFFIXES]
