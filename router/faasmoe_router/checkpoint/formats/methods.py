"""The methods of quantisation that checkpoints are read in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from faasmoe_router.checkpoint.formats.checkpoint_tensors import CheckpointTensors
from faasmoe_router.checkpoint.formats.compressed_tensors import compressed_tensors_weights
from faasmoe_router.checkpoint.formats.fp8 import fp8_weights
from faasmoe_router.checkpoint.formats.gptq import awq_weights, gptq_weights
from faasmoe_router.checkpoint.formats.modelopt import modelopt_weights
from faasmoe_router.checkpoint.formats.mxfp4 import mxfp4_weights
from faasmoe_router.checkpoint.formats.published import CodedTensor
from faasmoe_router.checkpoint.formats.settings import QuantizationSettings
from faasmoe_router.errors import SourceUnsupported
from faasmoe_transformers.weight_conversion import FLOAT_DTYPES, LazyTensor

METHODS: Mapping[str, Callable[[CheckpointTensors, QuantizationSettings], list[CodedTensor]]] = {
    "fp8": fp8_weights,
    "fbgemm_fp8": fp8_weights,
    "mxfp8": fp8_weights,
    "mxfp4": mxfp4_weights,
    "compressed-tensors": compressed_tensors_weights,
    "gptq": gptq_weights,
    "awq": awq_weights,
    "modelopt": modelopt_weights,
    "modelopt_fp4": modelopt_weights,
    "modelopt_mixed": modelopt_weights,
    "modelopt_mxfp8": modelopt_weights,
}
"""Function that finds the coded weights of a checkpoint, by `quant_method`."""


def dequantized_tensors(
    tensors: Mapping[str, LazyTensor], files: Sequence[Path], settings: QuantizationSettings
) -> dict[str, LazyTensor]:
    """Return a checkpoint's tensors with weights in the place of codes and scales.

    Args:
        tensors: the checkpoint's tensors.
        files: the files that hold them.
        settings: how it is quantised.

    Raises:
        SourceUnsupported: the method is unknown, or codes or scales are missing or have another
            dtype or shape than the method gives; names file, tensor, got and expected.
    """
    checkpoint = CheckpointTensors(tensors, files)
    if settings.method not in METHODS:
        raise _unknown_method(checkpoint, settings)
    coded = METHODS[settings.method](checkpoint, settings)
    if not coded:
        raise SourceUnsupported(
            f"{settings.path}: got quant_method {settings.method!r} but no tensor of its codes, "
            "expected quantised weights"
        )
    parts = frozenset(name for entry in coded for name in entry.parts)
    weights: dict[str, LazyTensor] = {}
    for entry in coded:
        if entry.name in weights or (entry.name in tensors and entry.name not in parts):
            raise checkpoint.error(
                entry.weight.codes_name, f"{entry.name} a second time", "one tensor for it"
            )
        entry.weight.published_bytes = sum(checkpoint.size_bytes(part) for part in entry.parts)
        weights[entry.name] = entry.weight
    return {name: tensor for name, tensor in tensors.items() if name not in parts} | weights


def _unknown_method(
    tensors: CheckpointTensors, settings: QuantizationSettings
) -> SourceUnsupported:
    coded = next((name for name in tensors if tensors.dtype(name) not in FLOAT_DTYPES), None)
    where = f" ({coded} in {tensors.file_of(coded)})" if coded else ""
    return SourceUnsupported(
        f"{settings.path}: got quant_method {settings.method!r}{where}, expected an unquantised "
        f"checkpoint or one of {', '.join(METHODS)}"
    )
