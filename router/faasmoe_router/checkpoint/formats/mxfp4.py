"""Checkpoints in mxfp4 as GPT-OSS is published: stacked experts in blocks of 32 columns."""

from __future__ import annotations

from faasmoe_router.checkpoint.formats.block_scaled import BlocksOf32
from faasmoe_router.checkpoint.formats.checkpoint_tensors import CheckpointTensors
from faasmoe_router.checkpoint.formats.published import CodedTensor
from faasmoe_router.checkpoint.formats.settings import QuantizationSettings

_BLOCKS_SUFFIX, _SCALES_SUFFIX = "_blocks", "_scales"


def mxfp4_weights(tensors: CheckpointTensors, _settings: QuantizationSettings) -> list[CodedTensor]:
    """Return the coded weights of a checkpoint in mxfp4.

    Raises:
        SourceUnsupported: blocks or scales have no counterpart, or another dtype or shape.
    """
    for name in tensors:
        if name.endswith(_SCALES_SUFFIX):
            blocks = name.removesuffix(_SCALES_SUFFIX) + _BLOCKS_SUFFIX
            tensors.require(blocks, beside=name, dtypes=("U8",))
    return [_coded_tensor(tensors, name) for name in tensors if name.endswith(_BLOCKS_SUFFIX)]


def _coded_tensor(tensors: CheckpointTensors, name: str) -> CodedTensor:
    target = name.removesuffix(_BLOCKS_SUFFIX)
    scales_name = target + _SCALES_SUFFIX
    tensors.require(name, beside=name, dtypes=("U8",))
    tensors.require(scales_name, beside=name, dtypes=("U8",))
    weight = BlocksOf32(tensors, name, scales_name)
    return CodedTensor(target, weight, frozenset({name, scales_name}))
